"""The fields of a stage as their source says, read without importing pydantic.

Help must answer at once, and importing pydantic takes longer than printing the help. So the
sentence, the default and the rough type of a field are read from the syntax of the config classes:
the same lines that make the fields, not a second list. A test compares both.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.stages import STAGES

Value = Literal["TEXT", "INT", "FLOAT", "BOOL"]

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ROOT / "config" / "sections.py"

_VALUES: tuple[tuple[tuple[str, ...], Value], ...] = (
    (("str", "Literal", "Format"), "TEXT"),
    (("bool",), "BOOL"),
    (("float", "PositiveFloat", "NonNegativeFloat", "Probability"), "FLOAT"),
    (("int", "PositiveInt", "NonNegativeInt"), "INT"),
)
"""Names in an annotation -> what the help shows for a value; the first that occurs decides."""


class Knob(NamedTuple):
    """What the help says of a field."""

    name: str
    """Dotted name: `trainer.learning_rate`."""
    value: Value
    default: Any
    """None where there is none, or where it is made by a function."""
    doc: str

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]


@cache
def _classes(file: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def outline(kind: str) -> dict[str, Knob]:
    """Every knob of a stage by its dotted name."""
    module, _, name = STAGES[kind].partition(":")
    file = ROOT.parent / Path(*module.split(".")).with_suffix(".py")
    return dict(_fields(name, _classes(SECTIONS) | _classes(file), ""))


def _fields(name: str, classes: dict[str, ast.ClassDef], prefix: str) -> Iterator[tuple[str, Knob]]:
    """The fields of a class and of the classes before it; a later definition wins."""
    node = classes[name]
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _fields(base.id, classes, prefix)
    for place, line in enumerate(node.body):
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        key = f"{prefix}{line.target.id}"
        if isinstance(line.annotation, ast.Name) and line.annotation.id in classes:
            yield from _fields(line.annotation.id, classes, f"{key}.")
        else:
            doc = _sentence(node.body[place + 1 : place + 2])
            yield key, Knob(key, _value(line.annotation), _default(line.value), doc)


@cache
def sentences(kind: type) -> dict[str, str]:
    """The docstring below each field of a class, its bases' included; read when it is asked for."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        node = _classes(Path(file)).get(base.__name__) if file and file.endswith(".py") else None
        for place, line in enumerate(node.body if node else ()):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and node:
                found[line.target.id] = _sentence(node.body[place + 1 : place + 2])
    return found


def _sentence(following: list[ast.stmt]) -> str:
    """The docstring below a field."""
    if following and isinstance(following[0], ast.Expr):
        constant = following[0].value
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
            return " ".join(constant.value.split())
    return ""


def _value(annotation: ast.expr) -> Value:
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    return next((value for known, value in _VALUES if names & set(known)), "TEXT")


def _default(value: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(value) if value is not None else None
    except ValueError:
        return None
