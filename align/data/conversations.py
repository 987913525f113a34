"""A chat as a template gets it, with functions and calls, and what the template makes of these.

Templates are free to ignore `tools`, to leave out calls, or to drop what a tool answered, and none says
so. Each shape of chat is therefore tried once, with made-up names that are looked for in the text.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.exact import strings_in
from align.data.tool_use import LEAVE_OUT, shown
from align.errors import Problem
from align.models.tokenizer import ChatFacts

Turns = Sequence[Mapping[str, Any]]
"""Messages, each with `role` and `content`; `tool_calls` (a list or its JSON text), a tool's `name` and
`tool_call_id`, and `weight` (0: not learned) where they have them."""

Tools = Sequence[Mapping[str, Any]] | None
"""The functions that a chat offers, as JSON schemas."""

CALL_ENDS = ("<|eom_id|>", "<|call|>")
"""Tokens that end a call where other tokens end an answer (Llama 3.1, Harmony)."""

ANOTHER = "give a template that does with model.chat_template_path (`llama3.1`, or a Jinja file)"


@dataclass(frozen=True)
class Reading:
    """What a template makes of the tools in chats of one shape."""

    problem: Problem | None = None
    text_arguments: bool = False
    """Whether it takes the arguments of a call as JSON text, and not as an object."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat as a template gets it."""

    turns: list[dict[str, Any]]
    """Without marks, and without empty keys, which templates take for keys that are there."""
    tools: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, chat: Turns, tools: Tools) -> "Conversation":
        """A row's messages and functions."""
        turns = [
            dict(turn)
            if len(turn) == 2
            else {key: value for key, value in shown(turn).items() if key != "weight"}
            for turn in chat
        ]
        return cls(turns, [dict(tool) for tool in tools] if tools else None)

    @property
    def uses_tools(self) -> bool:
        """Whether there are functions, calls, or answers of a tool."""
        return bool(self.tools) or any(
            turn["role"] == "tool" or turn.get("tool_calls") for turn in self.turns
        )

    @property
    def shape(self) -> tuple[object, ...]:
        """What a template may look at beside the texts."""
        bare = bool(self.tools) and "function" not in (self.tools or [{}])[0]
        turns = tuple(
            (
                turn["role"],
                bool(turn["content"].strip()),
                tuple(len(str(call.get("id", ""))) for call in turn.get("tool_calls", ())),
                "name" in turn,
                len(turn.get("tool_call_id", "")),
            )
            for turn in self.turns
        )
        return bool(self.tools), bare, turns

    def upto(self, turn: int) -> "Conversation":
        """The messages before one."""
        return replace(self, turns=self.turns[:turn])

    def adapted(self, reading: Reading) -> "Conversation":
        """With the arguments of its calls as the template takes them."""
        if not reading.text_arguments:
            return self
        made = []
        for turn in self.turns:
            calls = [_with_text(call) for call in turn.get("tool_calls", ())]
            made.append(turn | ({"tool_calls": calls} if calls else {}))
        return replace(self, turns=made)


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call["function"]
    text = json.dumps(inner["arguments"], ensure_ascii=False)
    return {**call, "function": {**inner, "arguments": text}}


def call_ends(tokenizer: PreTrainedTokenizerBase, facts: ChatFacts) -> frozenset[str]:
    """Control tokens that end a turn with calls."""
    tokens = [*facts.turn_ends, *CALL_ENDS, tokenizer.eos_token]
    return frozenset(token for token in tokens if token in facts.control)


# Every text of a conversation, to take control tokens out


def strings_of(conversation: Conversation) -> Iterator[str]:
    """Every text that a template may write of a chat."""
    for turn in conversation.turns:
        yield turn["content"]
        if len(turn) > 2:
            yield from strings_in({k: v for k, v in turn.items() if k not in ("role", "content")})
    if conversation.tools:
        yield from strings_in(conversation.tools)


def swapped(conversation: Conversation, texts: Mapping[str, str]) -> Conversation:
    """A chat with other texts in the places of its own."""
    turns = [
        {key: item if key == "role" else _swapped(item, texts) for key, item in turn.items()}
        for turn in conversation.turns
    ]
    return Conversation(turns, _swapped(conversation.tools, texts))


def _swapped(value: Any, texts: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return texts.get(value, value)
    if isinstance(value, Mapping):
        return {texts.get(key, key): _swapped(item, texts) for key, item in value.items()}
    return [_swapped(item, texts) for item in value] if isinstance(value, list) else value


# What a template writes of tools


def probe(conversation: Conversation) -> Conversation:
    """A chat of the same shape in which every text is a name of its own."""
    turns = []
    for number, turn in enumerate(conversation.turns):
        made = dict(turn)
        made["content"] = f"zq{number}zq" if turn["content"].strip() else ""
        if "tool_calls" in turn:
            made["tool_calls"] = [
                {**call, "function": _probe_call(f"{number}z{place}")}
                for place, call in enumerate(turn["tool_calls"])
            ]
        turns.append(made)
    if not conversation.tools:
        return Conversation(turns)
    function = {
        "name": "ztool",
        "description": "zdescription",
        "parameters": {
            "type": "object",
            "properties": {"zparameter": {"type": "string", "description": "zmeaning"}},
            "required": ["zparameter"],
        },
    }
    bare = "function" not in conversation.tools[0]
    return Conversation(turns, [function if bare else {"type": "function", "function": function}])


def _probe_call(number: str) -> dict[str, Any]:
    return {"name": f"zf{number}zf", "arguments": {f"za{number}za": f"zv{number}zv"}}


def read_probe(
    render: Callable[[Conversation], tuple[str, Any] | Problem],
    asked: Conversation,
    pattern: re.Pattern[str],
    ends: frozenset[str],
) -> Reading:
    """What a template makes of a probe.

    Arguments are given as an object. A template that cannot take that, or writes it as Python would
    and not as JSON, gets their JSON text.

    Args:
        render: writes a chat by the template.
        asked: from `probe`.
        pattern: of control tokens.
        ends: control tokens that end a turn with calls.
    """
    result = render(asked)
    text_arguments = False
    if isinstance(result, Problem) or "{'za" in result[0]:
        other = render(asked.adapted(Reading(text_arguments=True)))
        if not isinstance(other, Problem) and "{'za" not in other[0]:
            result, text_arguments = other, True
    if isinstance(result, Problem):
        return Reading()  # the row itself is refused, by the template's own words
    return Reading(_what_is_missing(asked, result[0], pattern, ends), text_arguments)


def _what_is_missing(
    asked: Conversation, text: str, pattern: re.Pattern[str], ends: frozenset[str]
) -> Problem | None:
    if asked.tools and not ("ztool" in text and "zparameter" in text):
        return Problem(
            "the row offers `tools`, and the chat template does not read them",
            hint=f"{ANOTHER}; {LEAVE_OUT}",
        )
    for number, turn in enumerate(asked.turns):
        if turn["role"] == "tool" and turn["content"] not in text:
            return Problem(
                f"the chat template leaves out what the tool answers in message {number + 1}",
                hint=ANOTHER,
            )
        if "tool_calls" in turn and (problem := _call_missing(asked, number, text, pattern, ends)):
            return problem
    return None


def _call_missing(
    asked: Conversation, number: int, text: str, pattern: re.Pattern[str], ends: frozenset[str]
) -> Problem | None:
    turn = asked.turns[number]
    names = [
        name
        for call in turn["tool_calls"]
        for name in (call["function"]["name"], *(w for p in _arguments(call) for w in p))
    ]
    if not all(name in text for name in names):
        return Problem(
            f"the chat template does not write the calls (`tool_calls`) of message {number + 1}",
            hint=f"{ANOTHER}, or write the calls into the message's `content`",
        )
    if turn["content"] and turn["content"] not in text:
        return Problem(
            f"the chat template leaves out the content of message {number + 1} beside its calls",
            hint=f"take the content out, or {ANOTHER}",
        )
    last = max(text.index(name) + len(name) for name in names)
    begin = text.index(turn["content"]) if turn["content"] else min(map(text.index, names))
    following = (text.find(t["content"]) for t in asked.turns[number + 1 :] if t["content"])
    limit = next((place for place in following if place >= 0), len(text))
    closing = [m.start() for m in pattern.finditer(text, begin) if m.group() in ends]
    if not closing or not last <= closing[0] <= limit:
        return Problem(
            f"the chat template does not end message {number + 1} with one token behind its calls",
            hint="give a template that does with model.chat_template_path",
        )
    return None


def _arguments(call: Mapping[str, Any]) -> list[tuple[str, str]]:
    given = call["function"]["arguments"]
    return list((json.loads(given) if isinstance(given, str) else given).items())
