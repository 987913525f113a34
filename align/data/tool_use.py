"""What rows say of tools and of what is learned, in the spellings that users bring, as one form.

Functions are JSON schemas, in OpenAI's wrapping (`{"type": "function", "function": {...}}`) or bare
(`{"name", "description", "parameters"}`), and go to the chat template as they are. Calls get OpenAI's
form with their arguments as an object, which is what chat templates on the Hub read.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.exact import CALLS, MARKS
from align.data.files import kind_of

Function = dict[str, Any]
Call = dict[str, Any]

LEAVE_OUT = "`data.use_tools: false` leaves the column out"
DETAIL = "train_detail"
"""axolotl's marks on parts of a message, by their characters."""


class RowError(Exception):
    """What is wrong with one row; whoever knows the row's place tells it to the user."""


def functions(value: Any, column: str) -> list[Function] | None:
    """The functions of a row: a list or its JSON text; None where there is none.

    Raises:
        RowError: the value is no list of functions with names.
    """
    found = _parsed(value)
    if found is None or found in ("", []):
        return None
    if isinstance(found, Mapping):
        found = [found]
    if not isinstance(found, list):
        raise RowError(f"`{column}` is {kind_of(found)} and no list of functions; {LEAVE_OUT}")
    made = [_parsed(item) for item in found]
    for number, item in enumerate(made, 1):
        if not isinstance(item, Mapping) or not _name_of(item):
            raise RowError(
                f"entry {number} of `{column}` is no function: it has no `name`; {LEAVE_OUT}"
            )
    return [dict(item) for item in made]


def calls(value: Any, name: str) -> list[Call]:
    """The calls of a message, or of a turn that is nothing but calls (LLaMA-Factory's `function_call`).

    Args:
        value: a call or a list of calls, bare or wrapped, as objects or JSON text.
        name: the message in words.

    Raises:
        RowError: a call has no name, or arguments that are no object.
    """
    found = _parsed(value)
    if found is None or found in ("", []):
        return []
    listed = found if isinstance(found, list) else [found]
    return [_call(_parsed(item), f"call {n} of {name}") for n, item in enumerate(listed, 1)]


def _call(item: Any, name: str) -> Call:
    if not isinstance(item, Mapping):
        raise RowError(f"{name} is {kind_of(item)} and no object with `name` and `arguments`")
    called = _name_of(item)
    if not called:
        raise RowError(f"{name} names no function")
    inner = item["function"] if isinstance(item.get("function"), Mapping) else item
    given = inner.get("arguments")
    given = inner.get("parameters") if given is None else given
    arguments = _parsed(given)
    arguments = {} if arguments is None or arguments == "" else arguments
    if not isinstance(arguments, Mapping):
        raise RowError(f"{name} has `arguments` that are no JSON object: {str(given)[:40]!r}")
    made: Call = {
        "type": "function",
        "function": {"name": called, "arguments": dict(arguments)},
    }
    return made | ({"id": item["id"]} if isinstance(item.get("id"), str) else {})


def _name_of(item: Mapping[str, Any]) -> str | None:
    inner = item.get("function")
    name = inner.get("name") if isinstance(inner, Mapping) else item.get("name")
    return name if isinstance(name, str) and name else None


def _parsed(value: Any) -> Any:
    """What a JSON text says; a text that is none, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else ""
    except ValueError:
        return value


def calls_of(message: Mapping[str, Any], name: str) -> list[Call]:
    """The calls in a message's own keys (`tool_calls`, `function_call`)."""
    return [call for key in CALLS for call in calls(message.get(key), f"`{key}` of {name}")]


def mark_of(message: Mapping[str, Any], name: str) -> int | None:
    """Whether a message is marked to be learned (1), or to be context only (0); None without a mark.

    Raises:
        RowError: a mark is neither 0, 1, true nor false, two marks differ, or only a part is marked.
    """
    if message.get(DETAIL):
        raise RowError(
            f"{name} marks parts of itself (`{DETAIL}`), and align marks whole turns: "
            "split the turn, or mark all of it with `train`"
        )
    found: dict[str, int] = {}
    for key in MARKS:
        mark = _parsed(message.get(key))
        if mark is None:
            continue
        if not isinstance(mark, bool | int | float) or mark not in (0, 1):
            raise RowError(f"`{key}` of {name} is {_shown(mark)}, and not 0, 1, true or false")
        found[key] = int(mark)
    if len(set(found.values())) > 1:
        said = " and ".join(f"`{key}` is {mark}" for key, mark in found.items())
        raise RowError(f"{name} contradicts itself: {said}")
    return next(iter(found.values()), None)


def _shown(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, str | int | float) else kind_of(value)


# Messages of canonical rows and in plain view


def stored(
    message: Mapping[str, Any], keys: Sequence[str], *, where: str = "a message"
) -> dict[str, Any]:
    """A message as a canonical row holds it, with a value for every key; calls are JSON text.

    Raises:
        RowError: it holds calls or a mark that the row has no place for.
    """
    lost = [key for key in ("tool_calls", "weight") if key in message and key not in keys]
    if lost:
        raise RowError(f"{where} has `{lost[0]}`, in a column where align does not look for it")
    made = {key: message.get(key) for key in keys}
    if made.get("tool_calls") is not None:
        made["tool_calls"] = json.dumps(made["tool_calls"], ensure_ascii=False)
    return made


def shown(message: Mapping[str, Any]) -> dict[str, Any]:
    """A canonical message as users and judges read it: calls as a list, no empty keys."""
    made = {key: value for key, value in message.items() if value is not None}
    if isinstance(made.get("tool_calls"), str):
        made["tool_calls"] = json.loads(made["tool_calls"])
    return made
