"""YAML as a person means it, with the line of every key.

PyYAML follows YAML 1.1, where `1e-5` is text, `no` is false, `010` is eight, `12:30` is 750 and the
last of two equal keys wins without a word. Here the scalars are those of YAML 1.2's core schema
(`010` stays text, and becomes 10 where a number is asked for), equal keys are an error, and size,
depth and the growth by aliases are bounded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from align.config.problems import KeyPath as KeyPath
from align.config.problems import RecipeProblem
from align.config.problems import dotted as dotted
from align.errors import AlignError, fail

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_NODES = 50_000
"""Values of a file with every alias written out."""

TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """A YAML file: plain data, and where each key stands."""

    name: str
    """The file as it is shown to the user."""
    data: dict[str, Any]
    lines: Mapping[KeyPath, int]
    texts: Mapping[KeyPath, str]
    """Path of a number, boolean or null -> the characters it was written with."""
    problems: tuple[RecipeProblem, ...] = ()
    """Mistakes beyond syntax (equal keys, unknown tags); the data leaves these values out."""


def _whole(text: str) -> int | str:
    try:
        return int(text, 0)
    except ValueError:  # more digits than Python converts
        return text


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_EXPONENT = r"(?:[eE][-+]?[0-9]+)"

_SCALARS = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""], lambda text: None),
    (
        "bool",
        re.compile(r"true|True|TRUE|false|False|FALSE"),
        list("tTfF"),
        lambda text: text.lower() == "true",
    ),
    (
        "int",
        re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+"),
        list("-+0123456789"),
        _whole,
    ),
    (
        "float",
        re.compile(
            rf"[-+]?(?:\.[0-9]+{_EXPONENT}?|[0-9]+\.[0-9]*{_EXPONENT}?|[0-9]+{_EXPONENT})"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
        _number,
    ),
)
"""Name, form, first characters and conversion of the scalars that are no text."""

_CONVERT = {TAG + name: convert for name, _, _, convert in _SCALARS}
_FORM = {TAG + name: form for name, form, _, _ in _SCALARS}


def plain(text: str) -> Any:
    """The value of an unquoted scalar: None, a boolean, a number, or the text itself."""
    for _, form, _, convert in _SCALARS:
        if form.fullmatch(text):
            return convert(text)
    return text


class _Loader(yaml.SafeLoader):
    """Composes nodes with the scalars above; constructs nothing."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _name, _form, _first, _ in _SCALARS:
    _Loader.add_implicit_resolver(TAG + _name, re.compile(f"(?:{_form.pattern})$"), _first)
_Loader.add_implicit_resolver(TAG + "merge", re.compile(r"<<$"), ["<"])


@dataclass
class _Reader:
    """Turns nodes into plain data and notes lines, texts and problems on the way."""

    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[RecipeProblem] = field(default_factory=list)
    nodes: int = 0

    def problem(self, node: yaml.Node, message: str, hint: str | None = None) -> None:
        self.problems.append(_at(self.name, node.start_mark.line + 1, message, hint))

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            hint = f"write the values out; a recipe has at most {MAX_NODES:,} of them"
            message = "aliases make this file grow without bound"
            raise AlignError(_at(self.name, node.start_mark.line + 1, message, hint))
        if path:
            self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self.scalar(node, path)

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        if node.tag == TAG + "str" and isinstance(node, yaml.ScalarNode):
            return node.value
        if node.tag == TAG + "merge":
            return node.value
        form = _FORM.get(node.tag)
        if form is None or not form.fullmatch(node.value):
            shown = node.tag.replace(TAG, "!!")
            self.problem(node, f"the tag `{shown}` is not allowed here", "write the plain value")
            return None
        self.texts[path] = node.value
        return _CONVERT[node.tag](node.value)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == TAG + "merge":
                merged = {**self.merge(value_node, path), **merged}
                continue
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.value:
                self.problem(key_node, "a key must be a name")
                continue
            key = key_node.value
            line = key_node.start_mark.line + 1
            if key in own:
                first = self.lines[*path, key]
                message = f"`{dotted((*path, key))}` is given twice (first in line {first})"
                self.problem(key_node, message, "keep one of the two")
                continue
            self.lines[*path, key] = line
            known = len(self.problems)
            value = self.value(value_node, (*path, key))
            if value is not None or len(self.problems) == known:  # no mistake is told twice
                own[key] = value
        return {**merged, **own}

    def merge(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        """What `<<: *anchor` brings in; of several mappings the first wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for source in reversed(sources):
            if not isinstance(source, yaml.MappingNode):
                self.problem(source, "`<<` takes a mapping or a list of mappings")
                continue
            merged.update(self.value(source, path))
        return merged


_HINTS = (
    (
        "cannot start any token",
        "indent with spaces, and quote text with special characters",
    ),
    (
        "mapping values are not allowed",
        'put text that holds ": " in quotes, and check the indentation',
    ),
    ("could not find expected ':'", "each line of a mapping has the form `key: value`"),
    ("expected <block end>", "check the indentation of this line"),
    (
        "undefined alias",
        "an `*alias` needs its `&anchor` above it; quote text that begins with `*`",
    ),
)


def _at(name: str, line: int | None, message: str, hint: str | None = None) -> RecipeProblem:
    where = f"{name}:{line}" if line else name
    return RecipeProblem(message, where, hint, file=name, line=line)


def _syntax(name: str, error: yaml.YAMLError) -> RecipeProblem:
    mark = getattr(error, "problem_mark", None)
    words = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    hint = next((hint for part, hint in _HINTS if part in words), None)
    return _at(name, mark.line + 1 if mark else None, f"not valid YAML: {words}", hint)


def parse(text: str, name: str) -> Document:
    """Read YAML text whose top level is a mapping (or nothing).

    Raises:
        AlignError: for broken syntax, for values that exceed the bounds, and for another top level.
    """
    if len(text) > MAX_BYTES:
        fail(f"larger than {MAX_BYTES:,} characters", where=name, hint="a recipe is a short file")
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise AlignError(_syntax(name, error)) from None
    finally:
        if loader is not None:
            loader.dispose()
    reader = _Reader(name)
    if root is None:
        return Document(name, {}, {}, {})
    data = reader.value(root, ())
    if not isinstance(data, dict):
        shown = "a list" if isinstance(data, list) else "a single value"
        raise AlignError(_at(name, 1, f"holds {shown}, not `key: value` lines"))
    return Document(name, data, reader.lines, reader.texts, tuple(reader.problems))


def read(path: Path, name: str | None = None) -> Document:
    """Read a YAML file; `name` is what errors call it (the path itself when None)."""
    name = name or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        fail("is a folder, not a recipe", where=name)
    except FileNotFoundError:
        fail("no such file", where=name)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        fail(f"cannot be read ({getattr(error, 'strerror', None) or error})", where=name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        fail("is not UTF-8 text", where=f"{name}:{line}", hint="save the file as UTF-8")
    return parse(text, name)


def parse_value(text: str, name: str) -> tuple[Any, dict[KeyPath, str]]:
    """The value of an override, and the characters of its scalars (see `Document.texts`).

    Lists, mappings and quoted text are YAML; everything else is one scalar, so that no colon or
    hash of a plain text needs quoting.
    """
    text = text.strip()
    if text[:1] not in ("[", "{", '"', "'"):
        value = plain(text)
        return value, {} if isinstance(value, str) else {(): text}
    document = parse(f"value: {text}", name)
    if document.problems:
        fail(document.problems[0].message, where=name, hint=document.problems[0].hint)
    texts = {path[1:]: written for path, written in document.texts.items()}
    if set(document.data) != {"value"}:
        fail("holds more than one value", where=name)
    return document.data["value"], texts
