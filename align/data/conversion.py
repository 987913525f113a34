"""One row of any known form to canonical rows: messages, prompt and completion, or pairs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from align.data.files import kind_of
from align.data.tool_use import RowError, calls, calls_of, mark_of

Row = Mapping[str, Any]
Message = dict[str, Any]
"""`role` and `content`; where the row has them, `tool_calls`, a tool's `name` and `tool_call_id`, and
`weight` (0: not learned)."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Role, or ShareGPT's `from` -> the role in a chat template."""

CALLING = ("function_call", "tool_call")
"""Roles whose content is nothing but calls of tools (LLaMA-Factory's, ms-swift's)."""

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ANSWER_KEYS = ("completion", "answer", "response", "text", "content")
SCORE_KEYS = ("score", "overall_score")


class NothingToLearn(RowError):
    """A well-formed row that teaches nothing: an empty answer, or two sides that are the same."""


def turns(value: Any, column: str) -> list[Message]:
    """Messages (`role`/`content`) or ShareGPT turns (`from`/`value`) as messages."""
    if isinstance(value, str) and is_transcript(value):
        return transcript(value)
    if not isinstance(value, list):
        raise RowError(f"`{column}` is {kind_of(value)} and not a list of messages")
    if not value:
        raise RowError(f"`{column}` is empty")
    named = [(item, f"message {number} of `{column}`") for number, item in enumerate(value, 1)]
    messages: list[Message] = []
    before = False
    for item, name in named:
        message, is_call = _message(item, name)
        # Calls at once, each in a message of its own, are one turn.
        if is_call and before and message.get("weight") == messages[-1].get("weight"):
            messages[-1]["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
        before = is_call
    return messages


def _message(item: Any, name: str) -> tuple[Message, bool]:
    """A message, and whether its role says that it is a call."""
    if not isinstance(item, Mapping):
        raise RowError(f"{name} is {kind_of(item)} and not an object with `role` and `content`")
    given = item.get("role") if item.get("role") is not None else item.get("from")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    if not isinstance(given, str):
        raise RowError(f"{name} has no `role`")
    key = given.strip().lower()
    role = ROLES.get(key)
    if role is None:
        raise RowError(
            f"{name} has the unknown role {given[:40]!r} (known: system, user, assistant, tool)"
        )
    called = calls_of(item, name)
    if called and role != "assistant":
        raise RowError(f"{name} calls a tool, and is a turn of the {role}")
    if key in CALLING:
        called, content = called + calls(content, name), ""
        if not called:
            raise RowError(f"{name} is a {key} without a call")
    if isinstance(content, list):
        content = "".join(_text_part(part, name) for part in content)
    if content is None and called:
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{name} has {kind_of(content)} as its content and not text")
    more = {"tool_calls": called or None, "weight": mark_of(item, name)}
    if role == "tool":
        more |= {k: item[k] for k in ("name", "tool_call_id") if isinstance(item.get(k), str)}
    given_more = {k: value for k, value in more.items() if value is not None}
    return {"role": role, "content": content} | given_more, key in CALLING


def _text_part(part: Any, name: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise RowError(f"{name} has a part that is not text")
    return text


def is_transcript(value: Any) -> bool:
    """Whether a text is written as in hh-rlhf: turns that begin with `Human:` and `Assistant:`."""
    if not isinstance(value, str):
        return False
    stripped = value.startswith(HH_HUMAN.lstrip()) and HH_ASSISTANT in value
    return stripped or value.startswith(HH_HUMAN)


def transcript(text: str) -> list[Message]:
    """The turns of an hh-rlhf text; an open answer at its end is left out."""
    messages: list[Message] = []
    rest = "\n\n" + text.lstrip("\n")
    while rest:
        role, mark = (
            ("user", HH_HUMAN) if rest.startswith(HH_HUMAN) else ("assistant", HH_ASSISTANT)
        )
        rest = rest[len(mark) :]
        places = [place for mark in (HH_HUMAN, HH_ASSISTANT) if (place := rest.find(mark)) >= 0]
        end = min(places, default=len(rest))
        messages.append({"role": role, "content": rest[:end].strip()})
        rest = rest[end:]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def text_of(row: Row, column: str, *, empty: bool = False) -> str:
    """A column's text."""
    value = row.get(column)
    if not isinstance(value, str):
        raise RowError(f"`{column}` is {kind_of(value)} and not text")
    if not value.strip() and not empty:
        raise NothingToLearn(f"`{column}` is empty")
    return value


def with_system(messages: list[Message], row: Row, system_prompt: str | None) -> list[Message]:
    """The messages behind a system turn: their own, the row's `system`, or the recipe's prompt."""
    own = row.get("system")
    system = own if isinstance(own, str) and own.strip() else system_prompt
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _check_answered(messages: Sequence[Message], column: str) -> None:
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowError(f"`{column}` ends on a turn of the {last['role']}, and not with an answer")
    if not last["content"].strip() and "tool_calls" not in last:
        raise NothingToLearn(f"`{column}` ends with an empty answer")


# Demonstrations


def chat(row: Row, column: str, system_prompt: str | None) -> dict[str, Any]:
    """A row of messages or of ShareGPT turns."""
    messages = with_system(turns(row.get(column), column), row, system_prompt)
    _check_answered(messages, column)
    return {"messages": messages}


def instruction(row: Row, system_prompt: str | None) -> list[Message]:
    """The prompt of an Alpaca row: history, instruction and input."""
    messages: list[Message] = []
    for number, past in enumerate(row.get("history") or (), 1):
        if not (
            isinstance(past, list) and len(past) == 2 and all(isinstance(t, str) for t in past)
        ):
            raise RowError(f"entry {number} of `history` is no pair of question and answer")
        messages.append({"role": "user", "content": past[0]})
        messages.append({"role": "assistant", "content": past[1]})
    question = text_of(row, "instruction")
    more = row.get("input")
    if isinstance(more, str) and more.strip():
        question = f"{question}\n\n{more}"
    messages.append({"role": "user", "content": question})
    return with_system(messages, row, system_prompt)


def alpaca(row: Row, system_prompt: str | None) -> dict[str, Any]:
    """An Alpaca row as a chat."""
    prompt = instruction(row, system_prompt)
    return {"messages": [*prompt, {"role": "assistant", "content": text_of(row, "output")}]}


def prompt_completion(row: Row, is_chat: bool, system_prompt: str | None) -> dict[str, Any]:
    """A prompt and its completion, both text or both messages."""
    if not is_chat:
        prompt, completion = text_of(row, "prompt", empty=True), text_of(row, "completion")
        return {"prompt": prompt, "completion": completion}
    answer = _answer(row.get("completion"), "completion")
    return {"prompt": _asked(row, "prompt", system_prompt), "completion": answer}


def _answer(value: Any, column: str) -> list[Message]:
    if isinstance(value, str) and not is_transcript(value):
        messages = [{"role": "assistant", "content": value}]
    else:
        messages = turns(value, column)
    _check_answered(messages, column)
    return messages


def _asked(row: Row, column: str, system_prompt: str | None) -> list[Message]:
    """A prompt as messages; a text is a user's turn."""
    value = row.get(column)
    if isinstance(value, str) and value.strip() and not is_transcript(value):
        messages = [{"role": "user", "content": value}]
    else:
        messages = turns(value, column)
    return with_system(messages, row, system_prompt)


# Prompts


def chat_prompt(row: Row, column: str, system_prompt: str | None) -> list[Message]:
    """The messages of a column without the answer at their end."""
    messages = turns(row.get(column), column)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise RowError(f"`{column}` has no user's turn to answer")
    return with_system(messages, row, system_prompt)


# Preferences


def pairs(
    row: Row, is_chat: bool, has_margin: bool, system_prompt: str | None
) -> Iterator[dict[str, Any]]:
    """The pairs of a row: chosen above rejected, and an edited answer, if any, above both.

    An edit that changed nothing adds no pair.
    """
    edited = row.get("edited")
    sides = ["edited"] if edited and edited not in (row.get("chosen"), row.get("rejected")) else []
    for better, worse in combinations([*sides, "chosen", "rejected"], 2):
        pair = _pair(row, better, worse, is_chat, system_prompt)
        yield pair | ({"margin": _margin(row)} if has_margin else {})


def _pair(
    row: Row, better: str, worse: str, is_chat: bool, system_prompt: str | None
) -> dict[str, Any]:
    if not is_chat:
        return dict(
            zip(("prompt", "chosen", "rejected"), _plain_pair(row, better, worse), strict=True)
        )
    first, second = marked = [_side(row, side) for side in (better, worse)]
    first, second = (_unmarked(side) for side in marked)
    if first == second:
        raise NothingToLearn(f"`{better}` and `{worse}` are the same")
    if first[0]["role"] != "assistant" and second[0]["role"] != "assistant":
        shared = _shared(first, second)
        prompt = with_system(first[:shared], row, system_prompt)
        first, second = first[shared:], second[shared:]
    elif row.get("prompt") is not None:
        prompt = _asked(row, "prompt", system_prompt)
    elif row.get("instruction") is not None:
        prompt = instruction(row, system_prompt)
    else:
        raise RowError(f"there is no `prompt`, and `{better}` does not begin with one")
    for side, messages in ((better, first), (worse, second)):
        if not prompt or not messages or messages[0]["role"] != "assistant":
            raise RowError(f"`{better}` and `{worse}` do not part at an answer to the same prompt")
        _check_answered(messages, side)
    for side, messages, answer in zip((better, worse), marked, (first, second), strict=True):
        _check_all_learned(messages[-len(answer) :], f"the answer `{side}`")
    return {"prompt": _unmarked(prompt), "chosen": first, "rejected": second}


def _unmarked(messages: Sequence[Message]) -> list[Message]:
    """The messages without marks, which say nothing in the prompt of a pair."""
    return [{k: v for k, v in message.items() if k != "weight"} for message in messages]


def _check_all_learned(answer: Sequence[Message], name: str) -> None:
    if any(message.get("weight") == 0 for message in answer):
        raise RowError(
            f"a turn of {name} is marked as not learned, and the answers of a pair "
            "are compared whole: take the mark out, or move the turn into the prompt"
        )


def _side(row: Row, column: str) -> list[Message]:
    value = row.get(column)
    if isinstance(value, str) and not is_transcript(value):
        return [{"role": "assistant", "content": text_of(row, column)}]
    return turns(value, column)


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _plain_pair(row: Row, better: str, worse: str) -> tuple[str, str, str]:
    first, second = text_of(row, better), text_of(row, worse)
    if first == second:
        raise NothingToLearn(f"`{better}` and `{worse}` are the same")
    if row.get("prompt") is not None:
        return text_of(row, "prompt", empty=True), first, second
    # The common beginning is the prompt, up to the last white space so that no word is cut.
    shared = _shared(first, second)
    while shared and not first[shared - 1].isspace():
        shared -= 1
    prompt, first, second = first[:shared], first[shared:], second[shared:]
    if not first or not second:
        raise RowError(f"`{better}` or `{worse}` is empty behind their common beginning")
    return prompt, first, second


def _margin(row: Row) -> float:
    if row.get("margin") is not None:
        return _number(row, "margin")
    return _number(row, "score_chosen") - _number(row, "score_rejected")


def _number(row: Row, column: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError, KeyError):
        raise RowError(f"`{column}` is {kind_of(row.get(column))} and not a number") from None
    if not math.isfinite(value):
        raise RowError(f"`{column}` is not finite")
    return value


def ranked(row: Row, column: str, system_prompt: str | None) -> Iterator[dict[str, Any]]:
    """All pairs of differently ranked answers in a list, as Llama 3's edited > chosen > rejected.

    The answers are objects with a `rank`, where the lowest is best, or with a `score`; or they are
    texts or messages, the best first. The margin is the difference of ranks or scores.
    """
    answers = row.get(column)
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowError(f"`{column}` is no list of at least two answers")
    asked = next((name for name in ("prompt", "context", "instruction") if row.get(name)), None)
    if asked is None:
        raise RowError("there is no `prompt`")
    prompt = (
        instruction(row, system_prompt)
        if asked == "instruction"
        else _unmarked(_asked(row, asked, system_prompt))
    )
    named = [
        (item, number, f"answer {number} of `{column}`") for number, item in enumerate(answers, 1)
    ]
    bare = not any(isinstance(item, Mapping) for item in answers)
    graded = [
        (float(-number), _answer(item, name)) if bare else _graded(item, name)
        for item, number, name in named
    ]
    for (_, answer), (_, _, name) in zip(graded, named, strict=True):
        _check_all_learned(answer, name)
    graded = [(grade, _unmarked(answer)) for grade, answer in graded]
    graded.sort(key=lambda pair: -pair[0])
    for (high, better), (low, worse) in combinations(graded, 2):
        if high != low and better != worse:
            yield {"prompt": prompt, "chosen": better, "rejected": worse, "margin": high - low}


def _graded(item: Any, name: str) -> tuple[float, list[Message]]:
    if not isinstance(item, Mapping):
        raise RowError(f"{name} is {kind_of(item)} and not an object")
    text = next((item[key] for key in ANSWER_KEYS if item.get(key) is not None), None)
    score = next((key for key in SCORE_KEYS if item.get(key) is not None), None)
    grade = _number(item, score) if score else -_number(item, "rank")
    return grade, _answer(text, name)
