"""Which rows hold more than roles and contents, told from the types of their columns."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Json, List, Value

from align.data.conversion import CALLING
from align.data.exact import CALLS, MARKS
from align.data.tool_use import DETAIL

ANY = "*"
"""Stands for the keys of a column of JSON, whose rows may hold any."""

TYPES = {
    "role": "string",
    "content": "string",
    "tool_calls": "string",
    "name": "string",
    "tool_call_id": "string",
    "weight": "int8",
}
"""Key of a canonical message -> its type; calls are JSON text, `weight` is 0, 1 or nothing."""


@dataclass(frozen=True)
class Extras:
    """What the rows of a source hold beside roles and contents."""

    tools: bool = False
    """A column of functions."""
    keys: tuple[str, ...] = ("role", "content")
    """Keys of a message in the canonical rows."""
    column: str | None = None
    """The column of functions."""

    def __or__(self, other: "Extras") -> "Extras":
        """What one or the other holds, for sources that become one table."""
        both = tuple(key for key in TYPES if key in self.keys or key in other.keys)
        return Extras(self.tools or other.tools, both, self.column)

    def said(self) -> str:
        """In words, for the end of a sentence."""
        parts = ["tools"] if self.tools else []
        parts += ["calls of tools"] if "tool_calls" in self.keys else []
        parts += ["marks of what is learned"] if "weight" in self.keys else []
        return f", with {' and '.join(parts)}" if parts else ""

    def structured(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """The columns with functions or calls that are not JSON text, with their types."""
        return {
            name: feature
            for name, feature in features.items()
            if (name == self.column and self.tools) or {*CALLS} & set(_keys(feature))
        }


NONE = Extras()


def turns(extras: Extras) -> Any:
    """The type of a column of messages."""
    return List({key: Value(TYPES[key]) for key in extras.keys})


def extras_of(dataset: Dataset, tools: str) -> Extras:
    """What the rows of a data set may hold; `tools` is the name of its column of functions."""
    features = {name: f for name, f in dataset.features.items() if name != tools}
    keys = {key for feature in features.values() for key in _keys(feature)}
    everything = ANY in keys
    calls = everything or bool({*CALLS} & keys) or _has_calling_roles(dataset, features)
    has = {
        "tool_calls": calls,
        "name": calls or "tool_call_id" in keys,
        "tool_call_id": everything or "tool_call_id" in keys,
        "weight": everything or bool({*MARKS, DETAIL} & keys),
    }
    given = dataset.features.get(tools)
    has_tools = given is not None and getattr(given, "dtype", None) != "null"
    named = tuple(key for key in TYPES if has.get(key, True))
    return Extras(has_tools, named, tools if has_tools else None)


def _keys(feature: Any) -> Iterator[str]:
    """Every key of the objects in a column."""
    if isinstance(feature, Json):
        yield ANY
    elif isinstance(feature, Mapping):
        yield from feature
        for inner in feature.values():
            yield from _keys(inner)
    elif isinstance(feature, list):
        yield from _keys(feature[0])
    elif hasattr(feature, "feature"):
        yield from _keys(feature.feature)


def _has_calling_roles(dataset: Dataset, columns: Iterable[str]) -> bool:
    """Whether some message is a call by its role alone."""
    for name in columns:
        array = dataset.data.column(name)
        if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
            continue
        messages = pc.list_flatten(array)
        if not pa.types.is_struct(messages.type):
            continue
        for key in ("role", "from"):
            if messages.type.get_field_index(key) >= 0:
                roles = pc.unique(pc.struct_field(messages, key)).to_pylist()
                if any(str(role).strip().lower() in CALLING for role in roles):
                    return True
    return False


def pruned(value: Any, feature: Any) -> Any:
    """A value without the empty keys that a table puts into objects of other rows.

    A table cannot tell a key that was not there from one that was null: both are taken for not there.
    Columns of JSON, as text or as the type, hold what was written and stay as they are.
    """
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {
            key: pruned(item, feature.get(key)) for key, item in value.items() if item is not None
        }
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [pruned(item, inner) for item in value]
    return value
