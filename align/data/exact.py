"""Parts of JSON rows that a table would change, as JSON text: functions, their calls, marks on turns.

A table has one type for all rows: `{"city": "Rome"}` in one row and `{"year": 3}` in another come out
as `{"city": "Rome", "year": None}` and `{"city": None, "year": 3}`, and a number beside a text is
refused. Functions and arguments differ from row to row, so they are held as the text they came as.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

TOOLS = "tools"
"""The column of functions that a row's assistant may call."""

CALLS = ("tool_calls", "function_call")
"""Keys of a message that hold calls of functions: OpenAI's, and its older one."""

MARKS = ("weight", "train", "training", "loss")
"""Keys of a message that say whether it is learned: OpenAI's, axolotl's two, ms-swift's."""


def as_text(value: Any) -> Any:
    """A value as JSON text; nothing stays nothing, and a text is taken for JSON already."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def held_exactly(value: Any) -> Any:
    """A value of a row, with what messages in it hold of calls and marks as JSON text."""
    if isinstance(value, list):
        return [held_exactly(item) if isinstance(item, list | dict) else item for item in value]
    if not isinstance(value, Mapping):
        return value
    made = {
        key: held_exactly(item) if isinstance(item, list | dict) else item
        for key, item in value.items()
        if key not in CALLS
    }
    made |= {key: as_text(value[key]) for key in CALLS if key in value}
    if "role" in value or "from" in value:
        # A text as a mark is a mistake, which must not look like the mark that it names.
        marks = {key: value[key] for key in MARKS if value.get(key) is not None}
        made |= {key: json.dumps(mark, ensure_ascii=False) for key, mark in marks.items()}
    return made


def turn_text(turn: Mapping[str, Any]) -> str:
    """What a message says, for readers: its content, then its calls as JSON."""
    calls = turn.get("tool_calls")
    parts = [str(turn.get("content") or ""), as_text(calls) if calls else ""]
    return "\n".join(filter(None, parts))


def strings_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)
