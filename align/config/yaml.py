"""YAML as a person means it, with the line of every key.

PyYAML follows YAML 1.1, where `1e-5` is text, `no` is false, `010` is eight, `12:30` is 750 and the
last of two equal keys wins without a word. Here the scalars are those of YAML 1.2's core schema
(`010` stays text, and becomes 10 where a number is asked for), equal keys are an error, and size,
depth and the growth by aliases are bounded.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from align.config.problems import KeyPath as KeyPath
from align.config.problems import RecipeProblem
from align.config.problems import dotted as dotted
from align.errors import AlignError, Problem, fail

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_NODES = 50_000
"""Values of a file with every alias written out."""

TAG = "tag:yaml.org,2002:"

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Only its parser is used: ten times faster in C, where PyYAML was built with it."""


class Document(NamedTuple):
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

_SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"~|null|Null|NULL|"), lambda text: None),
    "bool": (
        re.compile(r"true|True|TRUE|false|False|FALSE"),
        lambda text: text.lower() == "true",
    ),
    "int": (re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+"), _whole),
    "float": (
        re.compile(
            rf"[-+]?(?:\.[0-9]+{_EXPONENT}?|[0-9]+\.[0-9]*{_EXPONENT}?|[0-9]+{_EXPONENT})"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        _number,
    ),
}
"""Form and conversion of the scalars that are no text."""


def plain(text: str) -> Any:
    """The value of an unquoted scalar: None, a boolean, a number, or the text itself."""
    for form, convert in _SCALARS.values():
        if form.fullmatch(text):
            return convert(text)
    return text


@dataclass(slots=True)
class _Node:
    """A value as the file has it."""

    kind: str
    """`map`, `seq` or `str`."""
    value: Any
    """Pairs of nodes, nodes, or text."""
    line: int
    tag: str | None = None
    """A tag that the file gives."""
    plain: bool = False
    """Text without quotes, which may be no text."""


class _Composer:
    """Makes nodes of a parser's events; knows anchors, and how deep it is."""

    def __init__(self, name: str, events: Iterator[Any]) -> None:
        self.name = name
        self.events = events
        self.anchors: dict[str, _Node] = {}

    def document(self) -> _Node | None:
        """The root of the only document; None where the file holds nothing."""
        next(self.events)  # the start of the stream
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return None
        root = self.node(next(self.events), 1)
        next(self.events)  # the end of the document
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            self.fail(after, "a recipe is one document", "leave out what comes from `---` on")
        return root

    def node(self, event: Any, depth: int) -> _Node:
        line = event.start_mark.line + 1
        if depth > MAX_DEPTH:
            self.fail(event, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                hint = "an `*alias` needs its `&anchor` above; quote text that begins with `*`"
                self.fail(event, f"undefined alias `*{event.anchor}`", hint)
            return self.anchors[event.anchor]
        if isinstance(event, yaml.ScalarEvent):
            node = _Node("str", event.value, line, event.tag, event.implicit[0])
        elif isinstance(event, yaml.SequenceStartEvent):
            node = _Node("seq", list(self.items(yaml.SequenceEndEvent, depth)), line, event.tag)
        else:
            parts = list(self.items(yaml.MappingEndEvent, depth))
            pairs = list(zip(parts[::2], parts[1::2], strict=True))
            node = _Node("map", pairs, line, event.tag)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def items(self, end: type[Any], depth: int) -> Iterator[_Node]:
        while not isinstance(event := next(self.events), end):
            yield self.node(event, depth + 1)

    def fail(self, event: Any, message: str, hint: str | None = None) -> NoReturn:
        line = event.start_mark.line + 1
        raise AlignError(_at(self.name, line, f"not valid YAML: {message}", hint))


@dataclass
class _Reader:
    """Turns nodes into plain data and notes lines, texts and problems on the way."""

    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[RecipeProblem] = field(default_factory=list)
    nodes: int = 0

    def problem(self, node: _Node, message: str, hint: str | None = None) -> None:
        self.problems.append(_at(self.name, node.line, message, hint))

    def value(self, node: _Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            hint = f"write the values out; a recipe has at most {MAX_NODES:,} of them"
            message = "aliases make this file grow without bound"
            raise AlignError(_at(self.name, node.line, message, hint))
        if path:
            self.lines.setdefault(path, node.line)
        if node.tag not in (None, "!", TAG + node.kind):
            return self.tagged(node, path)
        if node.kind == "map":
            return self.mapping(node, path)
        if node.kind == "seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        found = plain(node.value) if node.plain else node.value
        if not isinstance(found, str):
            self.texts[path] = node.value
        return found

    def tagged(self, node: _Node, path: KeyPath) -> Any:
        """A value with a tag: `!!int 3` is as good as `3`, and no other tag is allowed."""
        name = str(node.tag).removeprefix(TAG)
        form, convert = _SCALARS.get(name, (None, None))
        if form and convert and node.kind == "str" and form.fullmatch(node.value):
            self.texts[path] = node.value
            return convert(node.value)
        shown = str(node.tag).replace(TAG, "!!")
        self.problem(node, f"the tag `{shown}` is not allowed here", "write the plain value")
        return None

    def mapping(self, node: _Node, path: KeyPath) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.plain and key == "<<":
                merged = {**self.merge(value_node, path), **merged}
                continue
            if key_node.kind != "str" or not key:
                self.problem(key_node, "a key must be a name")
                continue
            if key in own:
                first = self.lines[*path, key]
                message = f"`{dotted((*path, key))}` is given twice (first in line {first})"
                self.problem(key_node, message, "keep one of the two")
                continue
            self.lines[*path, key] = key_node.line
            known = len(self.problems)
            value = self.value(value_node, (*path, key))
            if value is not None or len(self.problems) == known:  # no mistake is told twice
                own[key] = value
        return {**merged, **own}

    def merge(self, node: _Node, path: KeyPath) -> dict[str, Any]:
        """What `<<: *anchor` brings in; of several mappings the first wins."""
        merged: dict[str, Any] = {}
        for source in reversed(node.value if node.kind == "seq" else [node]):
            if source.kind != "map":
                self.problem(source, "`<<` takes a mapping or a list of mappings")
                continue
            merged.update(self.value(source, path))
        return merged


_HINTS = (
    ("tab character", "indent with spaces"),
    ("cannot start any token", "indent with spaces, and quote text with special characters"),
    ("mapping values are not allowed", 'quote text that holds ": ", and check the indentation'),
    ("could not find expected ':'", "each line of a mapping has the form `key: value`"),
    ("expected", "check the brackets, the quotes and the indentation"),
)


def _at(name: str, line: int | None, message: str, hint: str | None = None) -> RecipeProblem:
    where = f"{name}:{line}" if line else name
    return RecipeProblem(message, where, hint, file=name, line=line)


def _syntax(name: str, error: yaml.YAMLError, lines: int) -> RecipeProblem:
    mark = getattr(error, "problem_mark", None)
    words = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    hint = next((hint for part, hint in _HINTS if part in words), None)
    line = min(mark.line + 1, lines) if mark else None
    return _at(name, line, f"not valid YAML: {words}", hint)


def parse(text: str, name: str) -> Document:
    """Read YAML text whose top level is a mapping (or nothing).

    Raises:
        AlignError: for broken syntax, for values that exceed the bounds, and for another top level.
    """
    if len(text) > MAX_BYTES:
        fail(f"larger than {MAX_BYTES:,} characters", where=name, hint="a recipe is a short file")
    reader = _Reader(name)
    try:
        root = _Composer(name, yaml.parse(text, Loader=LOADER)).document()
    except yaml.YAMLError as error:
        raise AlignError(_syntax(name, error, max(1, len(text.splitlines())))) from None
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
    try:
        document = parse(f"value: {text}", name)
        problems: tuple[Problem, ...] = document.problems
    except AlignError as error:
        problems = error.problems
    if problems:
        fail(problems[0].message, where=name, hint=problems[0].hint)
    texts = {path[1:]: written for path, written in document.texts.items()}
    if set(document.data) != {"value"}:
        fail("holds more than one value", where=name)
    return document.data["value"], texts
