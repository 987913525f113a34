"""Rows of a recipe: files, folders, cards and Hub ids, sliced and mixed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets.table import InMemoryTable
from numpy.typing import NDArray

from align.config.sections import DataSection, DatasetEntry, Format
from align.data.cards import Location, locate
from align.data.exact import TOOLS
from align.data.files import read_table
from align.data.fingerprint import SourceInfo, describe_location, entries
from align.errors import AlignError, fail
from align.resources import display

SEED = 42
"""Seed of the rows that a mixture takes and of their order; no seed of a recipe changes them."""

BOUND = r"-?\d+(?:(?:\.\d+)?%)?"
SLICE = re.compile(rf"\s*([^\[\]]+?)\s*(?:\[\s*({BOUND})?\s*:\s*({BOUND})?\s*\])?\s*")

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Rows of one entry of the recipe, as they are in their files."""

    name: str
    """As messages show it."""
    dataset: Dataset
    rows: Indices
    """For each row its place in the whole of the files, counted from 0."""
    files: tuple[tuple[str, int], ...]
    """Name and row count of each file, in order."""
    format: Format = "auto"
    columns: dict[str, str] | None = None
    """Mapping from our column names to the rows' own."""
    infos: tuple[SourceInfo, ...] = ()

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, index: int) -> str:
        """File and row number (from 1) of a row, for messages."""
        place = int(self.rows[index])
        for name, count in self.files:
            if place < count:
                return f"{name} row {place + 1}"
            place -= count
        return f"{self.name} row {place + 1}"

    def take(self, indices: Sequence[int] | Indices) -> "Source":
        """Some of the rows, in the order given."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, dataset=self.dataset.select(chosen), rows=self.rows[chosen])


def load_sources(data: DataSection, split: str | None = None) -> list[Source]:
    """Read every source of a recipe, sliced but not mixed.

    Args:
        data: the recipe's data section.
        split: read instead of the training split, with slicing.

    Raises:
        AlignError: something is missing, broken, unknown or empty.
    """
    return [_load(entry, data) for entry in entries(data, split)]


def _load(entry: DatasetEntry, data: DataSection) -> Source:
    parts = [_load_part(entry, part, data) for part in entry.split.split("+")]
    source = parts[0] if len(parts) == 1 else _joined(entry, parts)
    if not len(source):
        fail(
            f"`{entry.split}` takes no row",
            where=entry.path,
            hint=f"the split has {sum(count for _, count in source.files)} rows",
        )
    given = entry.columns or data.columns
    # What the recipe says of its columns replaces what the card says of them, its format included.
    form = data.format if data.format != "auto" or given else source.format
    source = replace(source, columns=given or source.columns, format=form)
    return source if data.use_tools else _without_tools(source)


def _without_tools(source: Source) -> Source:
    """The rows without their functions."""
    columns = {ours: name for ours, name in (source.columns or {}).items() if ours != TOOLS}
    dataset = source.dataset.remove_columns({TOOLS} & set(source.dataset.column_names))
    return replace(source, dataset=dataset, columns=columns)


def _joined(entry: DatasetEntry, parts: Sequence[Source]) -> Source:
    """Several splits as one source (`train+validation`)."""
    starts = np.cumsum([0, *(sum(count for _, count in part.files) for part in parts)])
    pairs = zip(parts, starts, strict=False)
    return replace(
        parts[0],
        dataset=concatenate([part.dataset for part in parts], entry.path),
        rows=np.concatenate([part.rows + start for part, start in pairs]),
        files=tuple(file for part in parts for file in part.files),
        infos=tuple(info for part in parts for info in part.infos),
    )


def _load_part(entry: DatasetEntry, split: str, data: DataSection) -> Source:
    match = SLICE.fullmatch(split)
    if match is None:
        fail(
            f"`{split}` is no split",
            where=entry.path,
            hint="write `train`, `train[:10%]`, `train[5:20]` or `train+validation`",
        )
    location = locate(entry.path, match[1], entry.name)
    if location.hub is not None:
        dataset = _from_hub(location)
        files: tuple[tuple[str, int], ...] = ((f"{location.hub} ({location.split})", len(dataset)),)
        infos: tuple[SourceInfo, ...] = (_hub_info(location, dataset),)
    else:
        mapping = entry.columns or data.columns or location.mapping
        tables = [read_table(file, mapping.get(TOOLS, TOOLS)) for file in location.files]
        sets = [Dataset(InMemoryTable(table)) for table in tables]
        dataset = concatenate(sets, entry.path)
        sizes = [table.num_rows for table in tables]
        files = tuple(zip(map(display, location.files), sizes, strict=True))
        described = zip(describe_location(location), sizes, strict=True)
        infos = tuple(replace(info, rows=size) for info, size in described)
    source = Source(
        location.name,
        dataset,
        np.arange(len(dataset)),
        files,
        location.format,
        dict(location.mapping),
        infos,
    )
    if match[2] is None and match[3] is None:
        return source
    return source.take(
        source.rows[_cut(match[2], len(dataset), 0) : _cut(match[3], len(dataset), -1)]
    )


def _cut(bound: str | None, size: int, default: int) -> int | None:
    """One bound of a slice as an index; a percentage is rounded to the nearest row."""
    if bound is None:
        return None if default else 0
    if bound.endswith("%"):
        return round(float(bound[:-1]) * size / 100)
    return int(bound)


def concatenate(datasets: Sequence[Dataset], where: str) -> Dataset:
    """Rows one after another; columns, and keys of objects in them, that some lack are empty there.

    Raises:
        AlignError: a column has different types.
    """
    if len(datasets) == 1:
        return datasets[0]
    try:
        wider = _widest([dataset.features for dataset in datasets])
        alike = [_widened(dataset, wider) for dataset in datasets]
        return concatenate_datasets(alike)
    except (ValueError, TypeError) as error:
        fail(
            f"its parts have columns of different types: {str(error).splitlines()[0]}",
            where=where,
            hint="give the columns one type, or leave a part out",
        )


def _widest(parts: Sequence[Features]) -> dict[str, Any]:
    """The type of each column, with the keys of objects that any part has."""
    wider: dict[str, Any] = {}
    for features in parts:
        for name, feature in features.items():
            wider[name] = _wider(wider[name], feature) if name in wider else feature
    return wider


def _wider(first: Any, second: Any) -> Any:
    """One type for two that differ in the keys of their objects; else the first as it is."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        both = {key: _wider(first[key], second[key]) for key in first if key in second}
        return {**first, **second, **both}
    if isinstance(first, List) and isinstance(second, List):
        return List(_wider(first.feature, second.feature))
    return second if _is_empty(first) else first


def _widened(dataset: Dataset, wider: Mapping[str, Any]) -> Dataset:
    """The rows with more keys in their objects; types that merely differ stay different."""
    own = dataset.features
    taken = {name: wider[name] if _fits(own[name], wider[name]) else own[name] for name in own}
    if taken == dict(own):
        return dataset
    return dataset.cast(Features(taken), keep_in_memory=True, load_from_cache_file=False)


def _fits(feature: Any, wider: Any) -> bool:
    if isinstance(feature, Mapping) and isinstance(wider, Mapping):
        return all(key in wider and _fits(feature[key], wider[key]) for key in feature)
    if isinstance(feature, List) and isinstance(wider, List):
        return _fits(feature.feature, wider.feature)
    return bool(_is_empty(feature) or feature == wider)


def _is_empty(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype == "null"


def _from_hub(location: Location) -> Dataset:
    try:
        dataset = load_dataset(location.hub, location.config, split=location.split)
    except AlignError:
        raise
    except Exception as error:  # whatever the Hub, the network or a data set's own files raise
        lines = str(error).splitlines() or [type(error).__name__]
        fail(
            f"cannot be loaded from the Hub: {lines[0]}",
            where=f"{location.name} ({location.split})",
            hint="check the id, the configuration and the split, or the path of a file",
        )
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Dataset):
        fail("is no table of rows", where=location.name)
    if not len(dataset):
        fail("holds no rows", where=f"{location.name} ({location.split})")
    return dataset


def _hub_info(location: Location, dataset: Dataset) -> SourceInfo:
    """The commit is in the addresses of the files that were downloaded."""
    addresses = " ".join(dataset.info.download_checksums or ())
    commit = re.search(r"@([0-9a-f]{40})/", addresses)
    revision = commit[1] if commit else None
    return SourceInfo(str(location.hub), location.split, revision=revision, rows=len(dataset))


def mixture(
    sizes: Sequence[int], weights: Sequence[float] | None, most: int | None
) -> list[Indices]:
    """Which rows of each source a mixture takes.

    With weights it is the largest mixture in these shares that takes no row twice; without, all
    rows. They are drawn with a fixed seed. A single source gives its first rows, in order.

    Args:
        sizes: rows of each source.
        weights: share of each source, relative to the others.
        most: rows in all at most.

    Returns:
        Ascending indices into each source; at least one row of each.
    """
    if len(sizes) == 1:
        return [np.arange(sizes[0] if most is None else min(most, sizes[0]))]
    shares = np.asarray(weights if weights is not None else sizes, dtype=np.float64)
    total = float(np.min(np.asarray(sizes) / shares))
    if most is not None:
        total = min(total, most / shares.sum())
    # The small addition keeps 0.3 / 0.1 from counting as 2 rows.
    counts = np.maximum(np.floor(total * shares + 1e-9), 1).astype(int)
    generator = np.random.default_rng(SEED)
    return [
        np.sort(generator.permutation(size)[:count]).astype(np.int64)
        for size, count in zip(sizes, counts, strict=True)
    ]
