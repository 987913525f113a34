"""Mistakes in a recipe, with everything that a person or an editor needs to mend them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from align.errors import Problem

KeyPath = tuple[str | int, ...]
"""The keys and list positions that lead to a value."""


def dotted(path: KeyPath) -> str:
    """`("data", "datasets", 0)` as `data.datasets.0`."""
    return ".".join(str(part) for part in path)


class Source(NamedTuple):
    """Where a value was given."""

    origin: str
    """`recipe.yaml:12`, `--set` or the flag's name."""
    file: str | None = None
    line: int | None = None
    folder: Path | None = None
    """Folder of the file, where its relative paths are looked for."""
    key: str | None = None
    """The dotted key as the file or command has it."""


@dataclass(frozen=True)
class RecipeProblem(Problem):
    """A problem with one key of a recipe."""

    file: str | None = None
    line: int | None = None
    key: str | None = None
    value: Any = None

    @staticmethod
    def at(
        source: Source, key: str, message: str, hint: str | None = None, value: Any = None
    ) -> "RecipeProblem":
        """A problem with the value that was given at `source`; `message` goes on after the key."""
        name = source.key or key
        text = f"`{name}` {message}"
        return RecipeProblem(text, source.origin, hint, source.file, source.line, name, value)


def as_json(problem: Problem) -> dict[str, Any]:
    """A problem for `--json`: file, line, key, value, where, message, hint."""
    found: dict[str, Any] = {"file": None, "line": None, "key": None, "value": None}
    if isinstance(problem, RecipeProblem):
        value = problem.value
        plain = isinstance(value, str | int | float | bool | list | dict | None)
        found = {"file": problem.file, "line": problem.line, "key": problem.key}
        found["value"] = value if plain else str(value)
    return found | {"where": problem.where, "message": problem.message, "hint": problem.hint}


def shown(value: Any) -> str:
    """A value as messages show it: short, on one line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    text = " ".join(str(value).split())
    return f"`{text[:57]}...`" if len(text) > 60 else f"`{text}`"


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Each problem once, by file and line; those of the command line last."""
    told: list[Problem] = []
    for problem in problems:
        if problem not in told:
            told.append(problem)
    files = list(dict.fromkeys(getattr(problem, "file", None) for problem in told))

    def place(problem: Problem) -> tuple[bool, int, int]:
        file, line = getattr(problem, "file", None), getattr(problem, "line", None)
        return file is None, files.index(file), line or 0

    return sorted(told, key=place)
