"""How many rows and tokens a stage will read, as far as files and cards tell. Light: nothing is downloaded."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from align.config.sections import DataSection
from align.data.cards import CARD, Card, locate, read_card
from align.data.fingerprint import entries
from align.errors import AlignError
from align.resources import shipped

LOOKED_AT = 256
"""Rows whose text is measured."""

MOST = 256e6
"""Bytes of a file that is still counted."""

CHARACTERS = 4.0
"""Characters of English text per token of a large vocabulary."""

SLICE = re.compile(r"\[(-?[\d.]*%?):(-?[\d.]*%?)\]")


@dataclass(frozen=True)
class Rows:
    """What is known of a stage's rows."""

    count: int | None
    """None where nobody can know before the data are here."""
    tokens: float | None
    """Tokens of a row on average, from the text of the first rows; None where no text is here."""
    source: str
    """Where the count comes from, in words."""
    downloads: tuple[str, ...] = ()
    """Hub data sets that will be fetched."""


def rows_of(data: DataSection) -> Rows:
    """Rows and tokens of a data section whose `$name` references are resolved elsewhere.

    Never raises for data that are not here: the source then says so.
    """
    try:
        found = [_entry_rows(one.path, one.split, one.name) for one in entries(data)]
    except AlignError as error:
        later = any("artifact" in Path(one).parts for one in _names(data))
        said = "written by an earlier run" if later else str(error.problems[0].message)
        return Rows(None, None, said)
    counts = [one.count for one in found]
    count = sum(one for one in counts if one is not None) if None not in counts else None
    if count is not None and data.max_samples:
        count = min(count, data.max_samples)
    if count is None and data.max_samples:
        return Rows(data.max_samples, _mean(found), "max_samples at most", _downloads(found))
    if count is not None and data.test_split_size:
        count -= round(count * data.test_split_size)
    source = "; ".join(dict.fromkeys(one.source for one in found))
    return Rows(count, _mean(found), source, _downloads(found))


def _names(data: DataSection) -> list[str]:
    return [one.path for one in data.datasets or ()] + [data.dataset_name or ""]


def _mean(found: list[Rows]) -> float | None:
    known = [(one.tokens, one.count or 1) for one in found if one.tokens is not None]
    if not known:
        return None
    return sum(tokens * rows for tokens, rows in known) / sum(rows for _, rows in known)


def _downloads(found: list[Rows]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for one in found for name in one.downloads))


def _entry_rows(path: str, split: str, config: str | None) -> Rows:
    total: int | None = 0
    tokens = None
    sources: dict[str, None] = {}
    downloads: dict[str, None] = {}
    for part in split.split("+"):
        name = part.partition("[")[0].strip()
        location = locate(path, name, config)
        if location.hub is not None:
            count = _hub_rows(location.hub, name)
            downloads[location.hub] = None
            said = "the data card" if count is not None else f"{location.hub} is not here"
        else:
            count, tokens = _count_files(location.files)
            said = f"{location.name}" if count is not None else "its files are not counted here"
        count = sliced(count, part)
        total = None if total is None or count is None else total + count
        sources[said] = None
    return Rows(total, tokens, "; ".join(sources), tuple(downloads))


def sliced(count: int | None, split: str) -> int | None:
    """Rows of `train[:10%]`, `train[100:200]`, ... when the split has `count`."""
    match = SLICE.search(split)
    if match is None:
        return count
    ends = match.groups()
    if count is None:
        counted = (ends[0] or "0").isdigit() and ends[1].isdigit()
        return max(int(ends[1]) - int(ends[0] or 0), 0) if counted else None

    def place(text: str, default: int) -> int:
        if not text:
            return default
        value = round(count * float(text[:-1]) / 100) if text.endswith("%") else int(text)
        return min(max(value + (count if value < 0 else 0), 0), count)

    return max(place(ends[1], count) - place(ends[0], 0), 0)


@cache
def _cards() -> dict[str, Card]:
    """Hub id -> the shipped card of that data set."""
    files = sorted(shipped("datasets").glob(f"*/{CARD}"))
    cards = [read_card(file) for file in files]
    return {card.hub: card for card in cards if card.hub is not None}


def _hub_rows(hub: str, split: str) -> int | None:
    card = _cards().get(hub)
    return card.hub_rows.get(split) if card else None


def _count_files(files: tuple[Path, ...]) -> tuple[int | None, float | None]:
    """Rows of local files, and tokens of the first ones by their characters."""
    total = 0
    lengths: list[float] = []
    for file in files:
        if file.suffix.lower() != ".jsonl" or file.stat().st_size > MOST:
            return None, None
        with file.open("rb") as handle:
            for line in handle:
                if not line.strip():
                    continue
                total += 1
                if len(lengths) < LOOKED_AT:
                    lengths.append(_tokens(line))
    return total, sum(lengths) / len(lengths) if lengths else None


def _tokens(line: bytes) -> float:
    try:
        row = json.loads(line)
    except ValueError:
        return 0.0
    used = {
        key: value
        for key, value in row.items()
        if key in ("messages", "conversations", "prompt", "completion", "chosen", "text")
    } if isinstance(row, dict) else {}  # fmt: skip
    return sum(math.ceil(len(text) / CHARACTERS) for text in _texts(used or row))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
