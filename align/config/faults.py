"""What pydantic refuses, in the words of a recipe."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from align.config.fields import LeafField, choices, describe, models
from align.config.problems import KeyPath, dotted, shown
from align.config.suggest import nearest


class Fault(NamedTuple):
    """What pydantic found, in our words."""

    path: KeyPath
    leaf: str
    message: str
    value: Any
    hint: str | None = None


_NOUNS = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "dict": "a mapping",
    "model": "a mapping",
    "list": "a list",
}


def _place(error: Mapping[str, Any], nested: Any) -> tuple[KeyPath, bool]:
    """The path in the data that pydantic means, and whether it goes on into a union's branch."""
    path: list[str | int] = []
    branched = False
    for part in error["loc"]:
        if (isinstance(nested, Mapping) and part in nested) or (
            isinstance(nested, list) and isinstance(part, int)
        ):
            nested = nested[part]
            path.append(part)
        elif error["type"] == "missing":
            path.append(part)
        else:
            branched = True
    return tuple(path), branched


def _inner_fault(leaf: LeafField, path: KeyPath, error: Mapping[str, Any]) -> Fault:
    """A mistake inside a list or mapping."""
    kind, value = str(error["type"]), error["input"]
    hint: str | None = None
    if kind == "missing":
        message, value = "is required", None
    elif kind == "extra_forbidden":
        message = f"is no key here (value {shown(value)})"
        keys = [key for model in models(leaf.annotation) for key in model.model_fields]
        close = nearest(str(path[-1]), keys)
        hint = f"did you mean `{close}`?" if close else f"one of {', '.join(keys)}"
    else:
        noun = _NOUNS.get(kind.partition("_")[0])
        words = noun or str(error["msg"]).replace("Input should be ", "")
        message = f"must be {words}, got {shown(value)}"
    return Fault(path, leaf.name, message, value, hint)


def _leaf_fault(leaf: LeafField, path: KeyPath, kind: str, value: Any) -> Fault:
    if kind == "missing":
        return Fault(path, leaf.name, "is required", None, leaf.doc)
    if kind == "too_short":
        return Fault(path, leaf.name, "must not be empty", value, leaf.doc)
    options = [str(option) for option in choices(leaf.annotation)]
    close = nearest(value, options, 0.5) if isinstance(value, str) else None
    return Fault(
        path,
        leaf.name,
        f"must be {describe(leaf.annotation)}, got {shown(value)}",
        value,
        f"did you mean `{close}`?" if close else None,
    )


def faults(error: ValidationError, nested: Any, leaves: Mapping[str, LeafField]) -> list[Fault]:
    """Each mistake once: the branches of a union that all refused a value are one mistake."""
    found: dict[KeyPath, Fault] = {}
    for item in error.errors(include_url=False):
        path, branched = _place(item, nested)
        name = next(dotted(path[:n]) for n in (2, 1) if dotted(path[:n]) in leaves)
        leaf = leaves[name]
        own = tuple(name.split("."))
        if branched or path == own:
            value = nested
            for key in own:
                value = value.get(key) if isinstance(value, Mapping) else None
            found.setdefault(own, _leaf_fault(leaf, own, item["type"], value))
        else:
            found.setdefault(path, _inner_fault(leaf, path, item))
    return list(found.values())
