"""Walks a config class: every knob with its dotted name, type, default and sentence."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from align.config.outline import sentences
from align.config.sections import Section, StageConfig
from align.stages import STAGES

_BOUNDS = {
    "gt": ("above {}", "> {}"),
    "ge": ("at least {}", ">= {}"),
    "lt": ("below {}", "< {}"),
    "le": ("at most {}", "<= {}"),
}
"""Bound -> how a sentence and how a table says it."""
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class LeafField(NamedTuple):
    """One knob of a stage."""

    name: str
    """Dotted name: `trainer.learning_rate`."""
    annotation: Any
    """The type, with its bounds (`Annotated`) where it has some."""
    default: Any
    """None where the field is required."""
    section: str
    """The part before the leaf: `trainer`; empty for a stage's own keys."""
    required: bool
    owner: type[Section]
    """The class that has the field."""

    @property
    def doc(self) -> str:
        """The sentence below the field."""
        return sentences(self.owner).get(self.leaf, "")

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def is_mapping(self) -> bool:
        return any(get_origin(part) is dict for part in parts(self.annotation))


def parts(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, without its bounds; the annotation alone where it is none."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return tuple(part for choice in get_args(annotation) for part in parts(choice))
    return (annotation,)


def mentioned(annotation: Any) -> set[Any]:
    """Every type that occurs in an annotation, also inside lists, mappings and models."""
    found: set[Any] = set()
    for part in parts(annotation):
        if isinstance(part, type) and issubclass(part, Section):
            for field in part.model_fields.values():
                found |= mentioned(field.annotation)
        elif get_origin(part) is Literal:
            found |= {type(value) for value in get_args(part)}
        elif get_origin(part) is None:
            found.add(part)
        else:
            found = found.union(*(mentioned(argument) for argument in get_args(part)))
    return found


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values of the annotation's `Literal`, if it has one."""
    return tuple(
        value
        for part in parts(annotation)
        if get_origin(part) is Literal
        for value in get_args(part)
    )


def models(annotation: Any) -> list[type[Section]]:
    """The config classes that occur inside an annotation (an entry of a list, say)."""
    found = []
    for part in parts(annotation):
        if isinstance(part, type) and issubclass(part, Section):
            found.append(part)
        for argument in get_args(part):
            found += models(argument) if get_origin(part) is not Literal else []
    return found


def bounds(metadata: Sequence[Any]) -> dict[str, Any]:
    """The bounds (`gt`, `ge`, `lt`, `le`, `min_length`) among the metadata of `Annotated`."""
    found: dict[str, Any] = {}
    for item in metadata:
        found |= bounds(getattr(item, "metadata", ()))  # a FieldInfo inside Annotated
        for name in (*_BOUNDS, "min_length"):
            bound = getattr(item, name, None)
            if bound is not None:
                found[name] = bound
    return found


def _in_words(metadata: Sequence[Any], style: int) -> list[str]:
    limits = bounds(metadata)
    return [words[style].format(limits[name]) for name, words in _BOUNDS.items() if name in limits]


def alternatives(annotation: Any) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Each alternative of an annotation with its own bounds."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        for part, more in alternatives(inner):
            yield part, [*metadata, *more]
    elif get_origin(annotation) in (Union, UnionType):
        for choice in get_args(annotation):
            yield from alternatives(choice)
    else:
        yield annotation, []


def describe(annotation: Any, *, plural: bool = False) -> str:
    """What a value must be, in words: `a number, above 0`, `text or a list of texts`."""
    words = []
    for part, metadata in alternatives(annotation):
        if part is NoneType:
            continue
        if get_origin(part) is Literal:
            values = [f"`{value}`" for value in get_args(part)]
            words.append(f"one of {', '.join(values)}" if len(values) > 1 else values[0])
        elif get_origin(part) is list:
            words.append(f"a list of {describe(get_args(part)[0], plural=True)}")
        elif get_origin(part) is dict:
            words.append("a mapping `{key: value}`")
        elif isinstance(part, type) and issubclass(part, Section):
            words.append("mappings" if plural else "a mapping")
        else:
            word = _WORDS.get(part, "a value")
            if plural:
                word = {"text": "texts", "a value": "values"}.get(word, f"{word[2:]}s")
            bounds = " and ".join(_in_words(metadata, 0))
            words.append(f"{word}, {bounds}" if bounds else word)
    return " or ".join(words)


def short_type(annotation: Any) -> str:
    """The type as the tables show it: `float > 0`, `merge|stack|continue`, `int or null`."""
    words = []
    for part, metadata in alternatives(annotation):
        if get_origin(part) is Literal:
            words.append("|".join(str(value) for value in get_args(part)))
        elif get_origin(part) is list:
            words.append(f"list of {short_type(get_args(part)[0])}")
        elif get_origin(part) is dict:
            words.append("mapping")
        else:
            name = {str: "text", NoneType: "null", Any: "any"}.get(part) or part.__name__
            name = "mapping" if isinstance(part, type) and issubclass(part, Section) else name
            words.append(f"{name} {', '.join(_in_words(metadata, 1))}".rstrip())
    return " or ".join(words)


def _section(field: FieldInfo) -> type[Section] | None:
    kind: Any = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def sections(config_class: type[Section]) -> Mapping[str, type[Section]]:
    """Name -> class of the sections that a config holds."""
    found = {name: _section(field) for name, field in config_class.model_fields.items()}
    return {name: section for name, section in found.items() if section is not None}


@cache
def leaf_fields(config_class: type[Section], section: str = "") -> tuple[LeafField, ...]:
    """Every knob of a config class, in order; `stage`, which only names the class, is none."""
    found: list[LeafField] = []
    for name, field in config_class.model_fields.items():
        path = f"{section}.{name}" if section else name
        inner = _section(field)
        if inner is not None:
            found += leaf_fields(inner, path)
        elif path != "stage":
            found.append(_leaf(path, section, field, config_class))
    return tuple(found)


def _leaf(name: str, section: str, field: FieldInfo, owner: type[Section]) -> LeafField:
    annotation: Any = field.annotation
    if field.metadata:
        annotation = Annotated[annotation, *field.metadata]
    required = field.is_required()
    return LeafField(
        name=name,
        annotation=annotation,
        default=None if required else field.get_default(call_default_factory=True),
        section=section,
        required=required,
        owner=owner,
    )


@cache
def config_class(kind: str) -> type[StageConfig]:
    """The config class of a stage. Imports that stage's module and nothing heavy."""
    module, _, name = STAGES[kind].partition(":")
    found: type[StageConfig] = getattr(import_module(module), name)
    return found
