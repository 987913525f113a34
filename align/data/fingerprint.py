"""What rows a recipe reads, by content: for lineage and for the fingerprint of a stage. Light."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from align.config.sections import DataSection, DatasetEntry
from align.data.cards import Location, locate
from align.errors import fail


@dataclass(frozen=True)
class SourceInfo:
    """One file, one Hub data set, or what a card says of how rows are read."""

    path: str
    """Absolute path, or the Hub id."""
    split: str
    sha256: str | None = None
    """Hash of the content; None for a Hub data set."""
    revision: str | None = None
    """Commit of a Hub data set, where it is known."""
    rows: int | None = None
    """Rows, where they are quickly counted or were read."""


def entries(data: DataSection, split: str | None = None) -> list[DatasetEntry]:
    """The sources of a recipe's data section; `split` is read instead of the training split.

    Raises:
        AlignError: no source is given, both ways are used, or only some sources have a weight.
    """
    where = "data"
    if data.datasets is not None and data.dataset_name is not None:
        fail("`dataset_name` and `datasets` are both given", where=where, hint="keep one of them")
    if data.datasets is None:
        if data.dataset_name is None:
            fail(
                "no data set is given",
                where=where,
                hint="set `dataset_name` to a file, folder, card or Hub id, or list `datasets`",
            )
        chosen = split or data.dataset_train_split
        return [DatasetEntry(path=data.dataset_name, name=data.dataset_config, split=chosen)]
    if not data.datasets:
        fail("is empty", where="data.datasets", hint="name at least one source")
    weighted = [entry.weight is not None for entry in data.datasets]
    if any(weighted) and not all(weighted):
        bare = data.datasets[weighted.index(False)]
        fail(
            f"{bare.path} has no weight, and other sources have one",
            where="data.datasets",
            hint="give a weight to all of them or to none",
        )
    if split is None:
        return list(data.datasets)
    return [entry.model_copy(update={"split": split}) for entry in data.datasets]


def describe_sources(data: DataSection) -> list[SourceInfo]:
    """Every file and Hub data set that a recipe reads, for training and evaluation, with its hash.

    Raises:
        AlignError: a file, folder, card or split is not there.
    """
    wanted = entries(data)
    if data.dataset_test_split:
        wanted += entries(data, data.dataset_test_split)
    found: dict[tuple[str, str], SourceInfo] = {}
    for entry in wanted:
        for part in entry.split.split("+"):
            location = locate(entry.path, part.partition("[")[0].strip(), entry.name)
            for info in (*describe_location(location), _reading(location)):
                if info is not None:
                    found.setdefault((info.path, info.split), info)
    return list(found.values())


def describe_location(location: Location) -> Iterator[SourceInfo]:
    """The files of a split with their hashes, or the Hub data set."""
    # Here, because lineage itself asks this module what a recipe reads.
    from align.lineage import CACHED_FROM, file_sha256

    if location.hub is not None:
        yield SourceInfo(location.hub, location.split)
    for file in location.files:
        countable = file.suffix.lower() == ".jsonl" and file.stat().st_size < CACHED_FROM
        rows = _lines(file) if countable else None
        yield SourceInfo(str(file), location.split, file_sha256(file), rows=rows)


def _lines(file: Path) -> int:
    with file.open("rb") as handle:
        return sum(bool(line.strip()) for line in handle)


def _reading(location: Location) -> SourceInfo | None:
    """What a card says of how its rows are read, as far as that changes them."""
    if location.card is None or (location.format == "auto" and not location.mapping):
        return None
    said = json.dumps([location.format, sorted(location.mapping.items())])
    digest = hashlib.sha256(said.encode()).hexdigest()
    return SourceInfo(str(location.card), location.split, digest)
