"""Chats and plain texts as the template writes them, and which characters the model writes itself.

Nothing here is a token yet. Templates are only ever rendered, never read, so one without
`{% generation %}` markers serves as well as one with them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from align.data.conversations import (
    Conversation,
    Reading,
    Tools,
    Turns,
    call_ends,
    probe,
    read_probe,
    strings_of,
    swapped,
)
from align.errors import Problem
from align.models.tokenizer import ChatFacts, chat_facts, render_marked

Span = tuple[int, int]
"""Start and end."""

STAND_INS = range(0xF0000, 0xF1000)
"""Private code points, one of which stands for the control tokens written in a row's contents."""


@dataclass(frozen=True, slots=True)
class Protected:
    """Control tokens that someone wrote in a message, taken out while the template is rendered."""

    mark: str = ""
    originals: tuple[str, ...] = ()

    def restore(self, text: str) -> str:
        """The text with the originals back in their places."""
        if not self.originals:
            return text
        stand_in = re.compile(f"{self.mark}([0-9]+){self.mark}")
        return stand_in.sub(lambda match: self.originals[int(match[1])], text)


@dataclass(slots=True)
class Layout:
    """A text whose token ids are wanted, and what is known of its characters."""

    text: str
    control: tuple[int, ...]
    """The control tokens that have to come out, in their order."""
    spans: list[Span] = field(default_factory=list)
    """Characters that the model writes itself and learns."""
    cuts: list[int] = field(default_factory=list)
    """Where the model's turns begin, learned or not: a prompt ended there once."""
    protected: Protected = Protected()
    follows: bool = True
    """Whether every span begins exactly where a generation prompt ends."""
    muted: list[int] = field(default_factory=list)
    """Places in `spans` of the turns that are marked as not learned."""


def protect(contents: Sequence[str], pattern: re.Pattern[str]) -> tuple[list[str], Protected]:
    """Put a stand-in for every control token in the contents of one row."""
    if not any(pattern.search(content) for content in contents):
        return list(contents), Protected()
    together = "".join(contents)
    mark = next(chr(code) for code in STAND_INS if chr(code) not in together)
    originals: list[str] = []

    def stand_in(match: re.Match[str]) -> str:
        originals.append(match.group())
        return f"{mark}{len(originals) - 1}{mark}"

    taken = [pattern.sub(stand_in, content) for content in contents]
    return taken, Protected(mark, tuple(originals))


class Typesetter:
    """Lays out rows in batches for one tokenizer; a row that the template refuses is a Problem."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.facts: ChatFacts = chat_facts(tokenizer)
        self._skeletons: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._readings: dict[tuple[object, ...], Reading] = {}
        self._call_ends = call_ends(tokenizer, self.facts)

    def plain(self, text: str, completion: str | None = None) -> Layout:
        """Begin token and text, then, where there is one, the completion and the end token.

        The completion with its end token is the span. A begin or end token that the row already
        carries in these places is not doubled.
        """
        begin, end = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        parts = [text.removeprefix(begin)]
        parts += [] if completion is None else [completion.removesuffix(end)]
        (head, *tail), protected = protect(parts, self.facts.pattern)
        written = (begin, end) if tail else (begin,)
        control = tuple(self.facts.control[token] for token in written if token)
        if not tail:
            return Layout(begin + head, control, protected=protected)
        start, whole = len(begin + head), begin + head + tail[0] + end
        return Layout(whole, control, [(start, len(whole))], [start], protected)

    def prompts(
        self, chats: Sequence[Turns], tools: Sequence[Tools] | None = None
    ) -> list[Layout | Problem]:
        """Chats up to where the answer begins; `tools` are the functions of each."""
        return self._lay_out(chats, tools, [len(chat) for chat in chats], opened=True)

    def chats(
        self,
        chats: Sequence[Turns],
        first: Sequence[int] | None = None,
        tools: Sequence[Tools] | None = None,
    ) -> list[Layout | Problem]:
        """Whole chats, with a span for each assistant turn from message `first` of the row on.

        A turn begins where the chat before it, rendered with the generation prompt, ends; it ends
        behind the token that ends it.
        """
        return self._lay_out(chats, tools, first or [0] * len(chats))

    def written(self, chat: Turns, tools: Tools = None) -> str | None:
        """A whole chat as the template writes it; None where it refuses these turns."""
        result = self._render([Conversation.of(chat, tools)])[0]
        return None if isinstance(result, Problem) else result[0]

    def _lay_out(
        self,
        chats: Sequence[Turns],
        tools: Sequence[Tools] | None,
        first: Sequence[int],
        *,
        opened: bool = False,
    ) -> list[Layout | Problem]:
        pairs = zip(chats, tools or [None] * len(chats), strict=True)
        protected = [self._protect(Conversation.of(chat, given)) for chat, given in pairs]
        readings = [self._reading(conversation, opened) for conversation, _ in protected]
        given = [c.adapted(r) for (c, _), r in zip(protected, readings, strict=True)]
        markers = self.facts.has_markers and not opened
        rendered = self._render(given, markers=markers, opened=opened)
        prefixes = self._prefixes(given)
        layouts: list[Layout | Problem] = []
        for place, result in enumerate(rendered):
            if isinstance(result, Problem):
                layouts.append(result)
                continue
            if (unread := readings[place].problem) is not None:
                layouts.append(unread)
                continue
            chat = given[place]
            layout = Layout(result[0], self._skeleton(chat, opened), protected=protected[place][1])
            problem = self._find_turns(layout, chat, first[place], prefixes[place])
            if problem is None:
                weights = [turn.get("weight") for turn in chats[place]]
                learned = [w for turn, w in enumerate(weights) if turn in prefixes[place]]
                _mute(layout, learned)
            if problem is None and markers and first[place] == 0:
                problem = self._compare(layout, result[1])
            layouts.append(problem or layout)
        return layouts

    def _protect(self, conversation: Conversation) -> tuple[Conversation, Protected]:
        strings = list(strings_of(conversation))
        taken, protected = protect(strings, self.facts.pattern)
        if not protected.originals:
            return conversation, protected
        return swapped(conversation, dict(zip(strings, taken, strict=True))), protected

    def _reading(self, conversation: Conversation, opened: bool) -> Reading:
        """What the template makes of the tools in such a chat, tried once for each shape of chat."""
        if not conversation.uses_tools:
            return Reading()
        key = (opened, conversation.shape)
        if key not in self._readings:
            self._readings[key] = read_probe(
                lambda asked: self._render([asked], opened=opened)[0],
                probe(conversation),
                self.facts.pattern,
                self._call_ends,
            )
        return self._readings[key]

    def _prefixes(self, chats: Sequence[Conversation]) -> list[dict[int, str | None]]:
        """For each chat: assistant turn -> the text before it as a prompt, where there is one."""
        found: list[dict[int, str | None]] = [
            {
                turn: None
                for turn, message in enumerate(chat.turns)
                if message["role"] == "assistant"
            }
            for chat in chats
        ]
        places = [(row, turn) for row, turns in enumerate(found) for turn in turns if turn > 0]
        prompts = self._render([chats[row].upto(turn) for row, turn in places], opened=True)
        for (row, turn), result in zip(places, prompts, strict=True):
            found[row][turn] = None if isinstance(result, Problem) else result[0]
        return found

    def _find_turns(
        self, layout: Layout, chat: Conversation, first: int, prefixes: Mapping[int, str | None]
    ) -> Problem | None:
        places: dict[int, Span] | None = None
        for turn, prefix in prefixes.items():
            if prefix is not None and layout.text.startswith(prefix):
                content = chat.turns[turn]["content"].strip()
                start = len(prefix)
                end = layout.text.find(content, start)
                end += len(content) if end >= 0 else 0
            else:
                # The template writes the turns before this one differently once the chat goes on.
                layout.follows = layout.follows and turn < first
                places = places if places is not None else self._contents(layout.text, chat)
                start, end = places.get(turn, (-1, -1))
            if end >= 0:
                layout.cuts.append(start)
            if turn < first:
                continue
            if end < 0 and "tool_calls" in chat.turns[turn]:
                return Problem(
                    f"the chat template writes what leads to the calls of message {turn + 1} in "
                    "another way once the chat goes on, so where they begin cannot be told",
                    hint="end the row behind that answer, or give a template that only adds to a "
                    "chat with model.chat_template_path",
                )
            if end < 0:
                return Problem(
                    f"the chat template leaves out or changes the answer in message {turn + 1}",
                    hint="give a template that writes every answer with model.chat_template_path",
                )
            layout.spans.append((start, self._end_of_turn(layout.text, end, chat.turns[turn])))
        return None

    def _end_of_turn(self, text: str, end: int, turn: Mapping[str, Any]) -> int:
        """Where the token behind a turn ends; `end` is the end of the turn's content.

        Behind a content that is the next control token, if it ends turns. Calls may hold control
        tokens of their own: there it is the first one that ends turns, as the reading has proved.
        """
        for token in self.facts.pattern.finditer(text, end):
            ends = self._call_ends if turn.get("tool_calls") else self.facts.turn_ends
            if token.group() in ends:
                return token.end()
            if not turn.get("tool_calls"):
                break
        return end

    def _contents(self, text: str, chat: Conversation) -> dict[int, Span]:
        """Where the content of each message lies in the rendered text; empty if it cannot be told.

        Found by rendering the chat once more with two unused characters around each content. A turn
        that is nothing but calls has no place: a content would change how it is written.
        """
        unused = (chr(code) for code in STAND_INS if chr(code) not in text)
        left, right = next(unused), next(unused)
        wrapped, found = [], []
        for number, turn in enumerate(chat.turns):
            content = turn["content"]
            core = content.strip()
            if not core and "tool_calls" in turn:
                wrapped.append(turn)
                continue
            before, _, after = content.partition(core) if core else (content, "", "")
            wrapped.append({**turn, "content": f"{before}{left}{core}{right}{after}"})
            found.append(number)
        result = self._render([Conversation(wrapped, chat.tools)])[0]
        if isinstance(result, Problem):
            return {}
        head, *pieces = result[0].split(left)
        places, position = [], len(head)
        for piece in pieces:
            core, _, rest = piece.partition(right)
            places.append((position, position + len(core)))
            position += len(core) + len(rest)
        same = result[0].replace(left, "").replace(right, "") == text
        return dict(zip(found, places, strict=True)) if same and len(places) == len(found) else {}

    def _compare(self, layout: Layout, marked: Sequence[Span]) -> Problem | None:
        """What is wrong if the template's own markers leave out a part of an answer.

        They may leave out the token that ends the turn, and hold what the template writes
        around it.
        """
        ends = "|".join(map(re.escape, [*self.facts.turn_ends, *self._call_ends]))
        for start, end in _outside(layout.spans, marked):
            if rest := re.sub(ends, "", layout.text[start:end]).strip():
                return Problem(
                    "the {% generation %} markers of the chat template leave out a part of an "
                    f"answer: {rest[:60]!r}",
                    hint="mend the markers, or take them out: answers are found without them",
                )
        return None

    def _render(
        self, chats: Sequence[Conversation], *, markers: bool = False, opened: bool = False
    ) -> list[tuple[str, list[Span]] | Problem]:
        groups: dict[str, list[int]] = {}
        for place, chat in enumerate(chats):
            groups.setdefault(repr(chat.tools), []).append(place)
        results: dict[int, tuple[str, list[Span]] | Problem] = {}
        for places in groups.values():
            alike = [chats[place] for place in places]
            made = self._render_alike(alike, markers=markers, opened=opened)
            results.update(zip(places, made, strict=True))
        return [results[place] for place in range(len(chats))]

    def _render_alike(
        self, chats: Sequence[Conversation], *, markers: bool, opened: bool
    ) -> list[tuple[str, list[Span]] | Problem]:
        """Render chats that offer the same functions."""
        if self.tokenizer.chat_template is None:
            problem = Problem(
                "the rows are chats, and the tokenizer has no chat template",
                hint="give one with model.chat_template_path (`llama3`, or a Jinja file)",
            )
            return [problem] * len(chats)
        try:
            texts, spans = render_marked(
                self.tokenizer,
                [chat.turns for chat in chats],
                tools=chats[0].tools,
                markers=markers,
                add_generation_prompt=opened,
            )
        except (TemplateError, TypeError, ValueError) as error:
            if len(chats) == 1:
                return [_refusal(chats[0].turns, error)]
            return [
                result
                for chat in chats
                for result in self._render_alike([chat], markers=markers, opened=opened)
            ]
        return list(zip(texts, spans or [[]] * len(texts), strict=True))

    def _skeleton(self, chat: Conversation, opened: bool) -> tuple[int, ...]:
        """The control tokens that the template writes for turns of these roles.

        Functions and calls are given as they are, with no control token of their own left in them.
        """
        neutral = [
            {**turn, "content": "x" if turn["content"].strip() else ""} for turn in chat.turns
        ]
        key = (opened, *((turn["role"], turn["content"]) for turn in neutral))
        known = not chat.tools and all(len(turn) == 2 for turn in neutral)
        if not known or key not in self._skeletons:
            result = self._render([Conversation(neutral, chat.tools)], opened=opened)[0]
            text = "" if isinstance(result, Problem) else result[0]
            tokens = self.facts.pattern.findall(text)
            found = tuple(self.facts.control[token] for token in tokens)
            if not known:
                return found
            self._skeletons[key] = found
        return self._skeletons[key]


def _mute(layout: Layout, weights: Sequence[int | None]) -> None:
    """Mark the spans whose turn is not learned; `weights` are the assistant turns', all of them."""
    taken = weights[len(weights) - len(layout.spans) :]
    layout.muted = [place for place, weight in enumerate(taken) if weight == 0]


def _outside(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """The parts of `spans` that no span of `others` covers; both ascending and without overlaps."""
    rest = []
    for start, end in spans:
        for low, high in others:
            if high <= start or low >= end:
                continue
            if low > start:
                rest.append((start, low))
            start = max(start, high)
        if start < end:
            rest.append((start, end))
    return rest


def _refusal(chat: Turns, error: Exception) -> Problem:
    roles = " -> ".join(turn["role"] for turn in chat[:8])
    hint = "change the row, or give another template with model.chat_template_path"
    if any(turn["role"] == "system" for turn in chat):
        hint += "; some templates take no system turn (data.system_prompt adds one)"
    return Problem(f"the chat template refuses these turns ({roles}): {error}", hint=hint)
