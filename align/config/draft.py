"""A config in the making: what files and flags gave, key by key, until it is checked and typed."""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from align.config.checks import troubles
from align.config.faults import Fault, faults
from align.config.fields import LeafField, leaf_fields, mentioned, parts, sections
from align.config.names import ALIASES
from align.config.paths import Trouble, locate, path_values, put
from align.config.problems import KeyPath, RecipeProblem, Source, dotted, shown
from align.config.references import is_reference
from align.config.sections import StageConfig
from align.config.suggest import advice
from align.config.yaml import Document, parse_value, plain
from align.errors import AlignError, fail

RESERVED = ("stage", "recipe", "optional")
"""Keys beside a stage's own that the loader reads itself."""


EITHER = (("data.dataset_name", "data.datasets"),)
"""Keys of which a recipe has one: that of a later layer takes the place of the other."""


class Override(NamedTuple):
    """`KEY=VALUE` from the command line."""

    key: str
    value: Any
    """Text as typed, or a value."""
    origin: str = "--set"


def parse_override(text: str | Override) -> Override:
    """`KEY=VALUE` as an override. Raises AlignError for anything else."""
    if isinstance(text, Override):
        return text
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        hint = "as in --set trainer.learning_rate=1e-4"
        fail(f"is no KEY=VALUE: `{text}`", where="--set", hint=hint)
    return Override(key.strip(), value)


@dataclass
class Layer:
    """A mapping of a document, whose keys go over those of the layers before it."""

    document: Document
    data: Mapping[str, Any]
    root: KeyPath = ()
    """Where the mapping stands in its document."""
    label: str = ""
    """What errors put in front of its keys: `sft.`, `defaults.`."""
    folder: Path | None = None

    def source(self, path: KeyPath) -> Source:
        lines, full = self.document.lines, (*self.root, *path)
        line = next((lines[full[:n]] for n in range(len(full), 0, -1) if full[:n] in lines), None)
        name = self.document.name
        origin = f"{name}:{line}" if line else name
        return Source(origin, name, line, self.folder, f"{self.label}{dotted(path)}")

    def below(self, path: KeyPath) -> dict[KeyPath, Source]:
        """The sources of everything inside the value at `path`, by path from there."""
        full = (*self.root, *path)
        inner = [key[len(full) :] for key in self.document.lines if key[: len(full)] == full]
        return {key: self.source((*path, *key)) for key in inner if key}

    def texts(self, path: KeyPath) -> dict[KeyPath, str]:
        full = (*self.root, *path)
        texts = self.document.texts
        return {key[len(full) :]: texts[key] for key in texts if key[: len(full)] == full}


@dataclass
class Given:
    """One leaf's value and where it, and what is inside it, was given."""

    value: Any
    source: Source
    inner: dict[KeyPath, Source] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)


@dataclass
class Draft:
    """What was given for one stage so far."""

    config_class: type[StageConfig]
    file: Source
    """The recipe itself, for what is missing in it."""
    prefix: str = ""
    """What errors put in front of keys that no file gave: the stage's name in a pipeline."""
    given: dict[str, Given] = field(default_factory=dict)
    problems: list[RecipeProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Keys that were given by another tool's name."""
    broken: set[str] = field(default_factory=set)
    """Sections that were given as a single value; nothing in them is missed."""

    @property
    def kind(self) -> str:
        return str(self.config_class.model_fields["stage"].default)

    @cached_property
    def leaves(self) -> dict[str, LeafField]:
        return {leaf.name: leaf for leaf in leaf_fields(self.config_class)}

    # --- which knob a key means -------------------------------------------------------------

    def find(self, name: str) -> tuple[LeafField | None, KeyPath]:
        """The knob that a dotted key means, and the path inside it (in `columns.prompt`: `prompt`).

        A bare name that exactly one section has is that section's.
        """
        words = name.split(".")
        for length in range(len(words), 0, -1):
            head, rest = ".".join(words[:length]), words[length:]
            section, _, word = head.rpartition(".")
            if word in ALIASES:
                head = f"{section}.{ALIASES[word]}" if section else ALIASES[word]
            leaf = self.leaves.get(head)
            if leaf is None and length == 1:
                same = [leaf for leaf in self.leaves.values() if leaf.leaf == head]
                leaf = same[0] if len(same) == 1 else None
            if leaf is not None and (not rest or leaf.is_mapping):
                return leaf, (".".join(rest),) if rest else ()
        return None, ()

    def unknown(self, source: Source, name: str, value: Any) -> None:
        hint = advice(name, self.leaves)
        same = [leaf.name for leaf in self.leaves.values() if leaf.leaf == name]
        if len(same) > 1:
            hint = f"several sections have it: {' or '.join(f'`{other}`' for other in same)}"
        message = f"is no key of `{self.kind}` (value {shown(value)})"
        hint = hint or f"`align {self.kind} --options` lists all keys"
        self.problems.append(RecipeProblem.at(source, name, message, hint, value))

    # --- layers -----------------------------------------------------------------------------

    def entries(self, layer: Layer) -> Iterator[tuple[KeyPath, Any]]:
        """The knobs of a layer: its top-level keys, and the keys of its sections."""
        known = sections(self.config_class)
        for key, value in layer.data.items():
            if key in RESERVED:
                continue
            if key not in known:
                yield (key,), value
            elif isinstance(value, Mapping):
                yield from (((key, inner), item) for inner, item in value.items())
            elif value is not None:
                first = next(leaf for leaf in self.leaves.values() if leaf.section == key)
                message = f"is a section with keys of its own, got {shown(value)}"
                hint = f"did you mean `{first.name}`?"
                source = layer.source((key,))
                self.problems.append(RecipeProblem.at(source, key, message, hint, value))
                self.broken.add(key)

    def add(self, layer: Layer) -> None:
        """Put a layer over what was given so far; unknown and doubled keys are problems."""
        taken: dict[str, KeyPath] = {}
        for path, value in self.entries(layer):
            leaf, inner = self.find(dotted(path))
            source = layer.source(path)
            if leaf is None:
                self.unknown(source, dotted(path), value)
            elif leaf.name in taken and not inner:
                first = layer.source(taken[leaf.name])
                message = f"is given twice: also as `{first.key}` in line {first.line}"
                problem = RecipeProblem.at(source, leaf.name, message, "keep one of the two", value)
                self.problems.append(problem)
            else:
                taken[leaf.name] = path
                self.put(leaf, inner, Given(value, source, layer.below(path), layer.texts(path)))
        for name, other in (*EITHER, *(pair[::-1] for pair in EITHER)):
            if name in taken and other not in taken:
                self.given.pop(other, None)

    def add_defaults(self, layer: Layer) -> set[KeyPath]:
        """Put in what this stage has of a layer that is meant for several; returns what it has.

        A nested key wins over a bare one, which may be meant for a stage that has it at its top.
        """
        used: set[KeyPath] = set()
        exact: set[str] = set()
        found = [(path, value, *self.find(dotted(path))) for path, value in self.entries(layer)]
        for path, value, leaf, inner in sorted(found, key=lambda item: len(item[0]), reverse=True):
            if leaf is None:
                continue
            used.add(path)
            if len(path) == 1 and leaf.section and leaf.name in exact:
                continue
            exact.add(leaf.name)
            given = Given(value, layer.source(path), layer.below(path), layer.texts(path))
            self.put(leaf, inner, given)
        return used

    def put(self, leaf: LeafField, inner: KeyPath, new: Given, *, replace: bool = False) -> None:
        """Set a knob. Mappings are merged key by key, unless `replace`; all else is replaced."""
        given = (new.source.key or "").rpartition(".")[2]
        if given in ALIASES:
            self.notes.append(f"{new.source.origin}: `{given}` is called `{leaf.name}` here")
        if inner:
            key = inner[0]
            new = Given(
                {key: new.value},
                new.source,
                {(key,): new.source, **{(key, *path): at for path, at in new.inner.items()}},
                {(key, *path): text for path, text in new.texts.items()},
            )
            replace = False
        old = self.given.get(leaf.name)
        both = leaf.is_mapping and old and isinstance(old.value, Mapping)
        if both and old and isinstance(new.value, Mapping) and not replace:
            new = Given(
                {**old.value, **new.value},
                new.source,
                {**old.inner, **new.inner},
                {**old.texts, **new.texts},
            )
        self.given[leaf.name] = new

    def override(self, change: Override, name: str | None = None) -> None:
        """Apply `KEY=VALUE` from the command line; `name` is the key without the stage's name."""
        name = change.key if name is None else name
        source = Source(change.origin, key=change.key)
        if name in sections(self.config_class) and isinstance(change.value, str):
            source = Source(f"{change.origin} {change.key}")
            message, hint = "is a section with keys of its own", f"set its keys: `{name}.<key>=...`"
            self.problems.append(RecipeProblem.at(source, change.key, message, hint, change.value))
            return
        leaf, inner = self.find(name)
        if leaf is None:
            self.unknown(source, name, change.value)
            return
        value: Any = change.value
        texts: dict[KeyPath, str] = {}
        if isinstance(value, str):
            try:
                value, texts = _typed(leaf, value, source.origin)
            except AlignError as error:
                problem = error.problems[0]
                told = RecipeProblem.at(source, name, problem.message, problem.hint, value)
                self.problems.append(told)
                return
        self.put(leaf, inner, Given(value, source, {}, texts), replace=True)

    # --- from what was given to a config ----------------------------------------------------

    def complete(
        self, *, in_pipeline: bool = False
    ) -> tuple[StageConfig | None, list[RecipeProblem]]:
        """The typed config, and the inputs that another run has to write first.

        What is wrong goes to `problems`. Values that are wrong are left out, so that one run of the
        checks finds the other mistakes too; the config is then good for further checks only, and
        None where even that is impossible.
        """
        nested = self.nested()
        bad = {name for name, leaf in self.leaves.items() if leaf.section in self.broken}
        config = self.validate(nested)
        if isinstance(config, ValidationError):
            self._as_text(config, nested)
            config = self.validate(nested)
        if isinstance(config, ValidationError):
            wrong = [
                fault
                for fault in faults(config, nested, self.leaves)
                if self.leaves[fault.leaf].section not in self.broken
            ]
            for fault in wrong:
                self.tell(fault)
            bad |= {fault.leaf for fault in wrong}
            for name in bad:
                _leave_out(self.leaves[name], nested)
        pending = self._find_paths(nested, bad, in_pipeline)
        config = self.validate(nested)
        if isinstance(config, ValidationError):
            return None, pending
        for trouble in troubles(config):
            if not bad & {self.leaf_of(trouble.key), *trouble.others}:
                self.tell(trouble)
        return config, pending

    def nested(self) -> dict[str, Any]:
        nested: dict[str, Any] = {name: {} for name in sections(self.config_class)}
        for name, given in self.given.items():
            wanted = mentioned(self.leaves[name].annotation)
            value = given.value if Any in wanted else _no_booleans(given, wanted)
            section, _, leaf = name.rpartition(".")
            (nested[section] if section else nested)[leaf] = deepcopy(value)
        return nested

    def validate(self, nested: dict[str, Any]) -> StageConfig | ValidationError:
        # Sections that nothing was given for stay unset, as in a config made in Python.
        bare = {key: value for key, value in nested.items() if value != {} or self._needed(key)}
        try:
            return self.config_class.model_validate(bare)
        except ValidationError as error:
            return error

    def _needed(self, key: str) -> bool:
        return self.config_class.model_fields[key].is_required() or key in self.given

    def _as_text(self, error: ValidationError, nested: dict[str, Any]) -> None:
        """Where text is wanted and a number was read, take the number as it was written."""
        for fault in faults(error, nested, self.leaves):
            given, leaf = self.given.get(fault.leaf), self.leaves[fault.leaf]
            inner = fault.path[len(leaf.name.split(".")) :]
            if given is None or not (inner or str in mentioned(leaf.annotation)):
                continue
            if isinstance(fault.value, list):
                texts = [given.texts.get((*inner, place)) for place in range(len(fault.value))]
                items = zip(fault.value, texts, strict=True)
                put(nested, fault.path, [_spelled(item, text) for item, text in items])
            elif fault.value is not None:
                put(nested, fault.path, _spelled(fault.value, given.texts.get(inner)))

    def _find_paths(
        self, nested: dict[str, Any], bad: set[str], in_pipeline: bool
    ) -> list[RecipeProblem]:
        pending: list[RecipeProblem] = []
        for pattern, path, text in list(path_values(nested)):
            name = self.leaf_of(path)
            if name in bad or (in_pipeline and is_reference(text)):
                continue
            if is_reference(text):
                hint = "only the stages of a pipeline have names; give a folder or a Hub id"
                found: str | Trouble = Trouble(path, f"refers to a stage (`{text}`)", hint)
            else:
                folder = self.source_of(path).folder or Path.cwd()
                found = locate(pattern, path, text, folder)
            if isinstance(found, str):
                put(nested, path, found)
            elif found.pending:
                source, key = self.source_of(path), f"{self.prefix}{dotted(path)}"
                message = f"{found.message}: {shown(text)}"
                pending.append(RecipeProblem.at(source, key, message, found.hint, text))
            else:
                bad.add(name)
                self.tell(Fault(path, name, f"{found.message}: {shown(text)}", text, found.hint))
        return pending

    # --- telling ----------------------------------------------------------------------------

    def leaf_of(self, path: KeyPath) -> str:
        """The dotted name of the knob at or above a path."""
        for length in (2, 1):
            if dotted(path[:length]) in self.leaves:
                return dotted(path[:length])
        return dotted(path)

    def source_of(self, path: KeyPath) -> Source:
        """Where the value at a path was given; the recipe itself where nobody gave it."""
        name = self.leaf_of(path)
        given = self.given.get(name)
        if given is None:
            return self.file
        inner = path[len(name.split(".")) :]
        length = next((n for n in range(len(inner), 0, -1) if inner[:n] in given.inner), 0)
        source, rest = given.inner.get(inner[:length], given.source), inner[length:]
        return source._replace(key=f"{source.key}.{dotted(rest)}") if rest else source

    def tell(self, wrong: Fault | Trouble) -> None:
        path = wrong.path if isinstance(wrong, Fault) else wrong.key
        value = wrong.value if isinstance(wrong, Fault) else self._value(path)
        source, key = self.source_of(path), f"{self.prefix}{dotted(path)}"
        problem = RecipeProblem.at(source, key, wrong.message, wrong.hint, value)
        self.problems.append(problem)

    def _value(self, path: KeyPath) -> Any:
        given = self.given.get(self.leaf_of(path))
        return given.value if given else None

    def origins(self) -> dict[str, str]:
        """Where every knob's value comes from: `default`, `file:line`, `--set` or a flag."""
        return {
            name: self.given[name].source.origin if name in self.given else "default"
            for name in self.leaves
        }


def _typed(leaf: LeafField, text: str, origin: str) -> tuple[Any, dict[KeyPath, str]]:
    """The value of an override: YAML where the knob takes lists or mappings, else one scalar."""
    structured = any(hasattr(part, "__args__") for part in parts(leaf.annotation))
    if structured or text[:1] in "\"'":
        return parse_value(text, origin)
    value = plain(text.strip())
    return value, {} if isinstance(value, str) else {(): text.strip()}


def _no_booleans(given: Given, wanted: Iterable[Any]) -> Any:
    """The value; booleans become text where none is wanted (pydantic takes them for 0 and 1)."""
    if bool in set(wanted):
        return given.value

    def walk(value: Any, path: KeyPath) -> Any:
        if isinstance(value, bool):
            return given.texts.get(path, str(value).lower())
        if isinstance(value, Mapping):
            return {key: walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, (*path, index)) for index, item in enumerate(value)]
        return value

    return walk(given.value, ())


def _spelled(value: Any, text: str | None) -> Any:
    """A number as it was written; any other value as it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return text if is_number and text is not None else value


def _leave_out(leaf: LeafField, nested: dict[str, Any]) -> None:
    """Take a wrong value out; a required one is replaced by something that passes for it."""
    section, _, name = leaf.name.rpartition(".")
    holder = nested[section] if section else nested
    holder.pop(name, None)
    if leaf.required:
        holder[name] = {"?": "?"} if leaf.is_mapping else "?"
