"""Data cards, and which files a recipe means by the name of a data set. Light: no heavy library.

A data set is a file, a folder of files, a folder with a `card.yaml` (shipped ones by their bare
name), or a Hub id, taken for one only where nothing of that name lies here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from align.config.sections import Format, Section
from align.config.suggest import nearest
from align.errors import AlignError, Problem, fail
from align.resources import display, find_path

CARD = "card.yaml"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
SHARD = re.compile(r"[-_]\d.*$")
"""What follows the split in `train-00000-of-00003.parquet`."""


class CardSplit(Section):
    """One split of a card that has its rows beside it."""

    file: str
    """File beside the card."""
    rows: int | None = None
    """Rows that the file holds."""
    format: Format = "auto"
    """Form of the rows."""


class Card(Section):
    """What a data set is, where it comes from, under which licence, and how its rows are read."""

    name: str
    description: str
    license: str
    source: str
    """Where the rows come from: an address, or the command that makes them."""
    hub: str | None = None
    """Hub id of the rows, where they do not lie beside the card."""
    config: str | None = None
    """Configuration of the Hub data set."""
    splits: dict[str, CardSplit | None] = Field(min_length=1)
    """Splits: the file of each, or nothing for a Hub data set."""
    hub_rows: dict[str, int] = Field(default_factory=dict)
    """Rows of the Hub data set's splits, where they are known."""
    format: Format = "auto"
    """Form of the rows of every split that does not name its own."""
    mapping: dict[str, str] | None = None
    """Mapping from align's column names to the rows' own, as `data.columns` in a recipe."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column -> what it holds."""

    @model_validator(mode="after")
    def rows_lie_beside_the_card_or_on_the_hub(self) -> "Card":
        without = [name for name, split in self.splits.items() if split is None]
        if self.hub is None and without:
            raise ValueError(f"split {without[0]}: names no file, and the card has no `hub`")
        return self


def read_card(file: Path) -> Card:
    """Read a `card.yaml`.

    Raises:
        AlignError: it is no YAML, or keys are missing, unknown or of the wrong type.
    """
    where = display(file)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"cannot be read: {error}", where=where)
    try:
        return Card.model_validate(content)
    except ValidationError as error:
        raise AlignError(
            *(
                Problem(f"{'.'.join(map(str, item['loc'])) or 'card'}: {item['msg']}", where)
                for item in error.errors()
            )
        ) from None


@dataclass(frozen=True)
class Location:
    """Where the rows of one split lie."""

    name: str
    """As messages show it."""
    split: str
    """Without slicing."""
    files: tuple[Path, ...] = ()
    """Local files, in order; none for a Hub data set."""
    hub: str | None = None
    config: str | None = None
    format: Format = "auto"
    mapping: Mapping[str, str] = field(default_factory=dict)
    card: Path | None = None
    """The card that says so."""


def locate(name: str, split: str, config: str | None = None) -> Location:
    """Find the rows that a recipe means by a name and a split (without slicing).

    Raises:
        AlignError: nothing of that name, an unknown split, or a file of an unknown kind.
    """
    path = find_path(name, rooms=("datasets",))
    if path is None:
        if _only_a_path(name):
            fail("no such file or folder", where=name, hint=f"looked in {Path.cwd()}")
        return Location(name, split, hub=name, config=config)
    name = display(path)
    if (path / CARD).is_file():
        return _from_card(path, name, split, config)
    if path.is_dir():
        return Location(name, split, files=_files_of_split(path, split))
    if path.suffix.lower() not in SUFFIXES:
        fail(f"is no {', '.join(SUFFIXES)} file", where=name, hint="convert it to one of these")
    if split not in ("train", path.stem):
        fail(
            f"is a single file and has no split `{split}`",
            where=name,
            hint="leave the split out (`train[:90%]` takes a part), or name another file",
        )
    return Location(name, split, files=(path,))


def _only_a_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or name.lower().endswith(SUFFIXES)
        or not HUB_ID.fullmatch(name)
    )


def _from_card(folder: Path, name: str, split: str, config: str | None) -> Location:
    card = read_card(folder / CARD)
    if split not in card.splits:
        _unknown_split(name, split, list(card.splits))
    mapping = card.mapping or {}
    given = card.splits[split]
    if given is None:
        return Location(
            name, split, (), card.hub, config or card.config, card.format, mapping, folder / CARD
        )
    file = folder / given.file
    if not file.is_file():
        fail(f"the card names {given.file}, which is not there", where=display(folder / CARD))
    form = given.format if given.format != "auto" else card.format
    return Location(name, split, (file,), format=form, mapping=mapping, card=folder / CARD)


def _files_of_split(folder: Path, split: str) -> tuple[Path, ...]:
    """The files whose name is the split, or the split and a shard number; also those in `data/`."""
    splits: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.glob("*")):
            if file.is_file() and file.suffix.lower() in SUFFIXES:
                splits.setdefault(SHARD.sub("", file.stem), []).append(file)
    if not splits:
        fail(f"holds no {', '.join(SUFFIXES)} file", where=display(folder))
    if split in splits:
        return tuple(splits[split])
    named = [file for files in splits.values() for file in files if file.stem == split]
    return tuple(named) or _unknown_split(display(folder), split, sorted(splits))


def _unknown_split(where: str, split: str, known: list[str]) -> Any:
    close = nearest(split, known)
    hint = f"its splits: {', '.join(f'`{name}`' for name in known)}"
    fail(
        f"has no split `{split}`",
        where=where,
        hint=f"{hint}; did you mean `{close}`?" if close else hint,
    )
