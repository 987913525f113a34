"""One row to token ids: chats, prompts, completions, pairs and plain text, with loss masks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from align.data.conversations import Tools, Turns, call_ends
from align.data.encoding import Encoded, Encoder
from align.data.format_tokens import FormatTokens
from align.data.layout import Layout, Typesetter
from align.errors import AlignError, Problem

Prompt = str | Turns
"""Messages, or plain text that no template touches."""
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sequence of tokens, all of equal standing but for the mask."""

    input_ids: list[int]
    loss_mask: list[int]
    """1 for every token that is in the loss."""
    ended: bool = True
    """Whether the last token in the loss ends a turn or the text."""
    escaped: bool = False
    """Whether a control token written in the row was kept as text."""
    split: bool = False
    """Whether the text was cut at the start of an answer, where a token reached across."""
    muted: bool = False
    """Whether a turn of the assistant is marked as not learned."""
    foreign: bool = False
    """Whether a turn of someone else is marked to be learned, and is not."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and completions behind it: `prompt_ids + completions[i]` is a sequence."""

    prompt_ids: list[int]
    completions: list[list[int]]
    ended: bool = True
    """Whether every completion ends with a token that ends a turn or the text."""
    escaped: bool = False
    split: bool = False
    formats: list[list[int]] | None = None
    """For each completion 1 where the template and not an author wrote the token, if asked for."""


class Renderer:
    """Renders rows in batches. A row that cannot be rendered gives a Problem in its place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.typesetter = Typesetter(tokenizer)
        self.encoder = Encoder(tokenizer)
        self.format_tokens = FormatTokens(tokenizer)
        facts = self.typesetter.facts
        tokens = {*facts.turn_ends, *call_ends(tokenizer, facts), tokenizer.eos_token}
        self.end_ids = frozenset(facts.control[token] for token in tokens if token)

    def chats(
        self,
        chats: Sequence[Turns],
        *,
        first: Sequence[int] | None = None,
        whole: bool = False,
        tools: Sequence[Tools] | None = None,
    ) -> list[Rendered | Problem]:
        """Chats as `apply_chat_template` tokenizes them, each with the functions that it offers.

        The loss is on assistant turns with the token that ends each of them, or, with `whole`, on
        every token; turns with the weight 0 are in no loss. `first` gives for each row the first
        message that may be in the loss.
        """
        made = self._sequences(self.typesetter.chats(chats, first, tools), whole=whole)
        return [
            _with_others(item, chat, whole) if isinstance(item, Rendered) else item
            for chat, item in zip(chats, made, strict=True)
        ]

    def completions(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Rendered | Problem]:
        """Plain texts: begin token, prompt, completion, end token; the last two are in the loss."""
        pairs = zip(prompts, completions, strict=True)
        return self._sequences([self.typesetter.plain(*pair) for pair in pairs])

    def texts(self, texts: Sequence[str]) -> list[Rendered | Problem]:
        """Plain texts between begin and end token, every token in the loss."""
        return self._sequences([self.typesetter.plain(text, "") for text in texts], whole=True)

    def prompts(
        self, prompts: Sequence[Prompt], tools: Sequence[Tools] | None = None
    ) -> list[list[int] | Problem]:
        """Prompts up to where the answer begins: chats with the generation prompt, plain text."""
        encoded = self._encode(self._opened(prompts, tools))
        return [item if isinstance(item, Problem) else item[1].ids for item in encoded]

    def answers(
        self,
        rows: Sequence[tuple[Prompt, Sequence[Prompt]]],
        *,
        formats: bool = False,
        tools: Sequence[Tools] | None = None,
    ) -> list[Answered | Problem]:
        """Prompts, each with the same number of completions; with `formats`, their format masks.

        `tools` are the functions that each prompt offers.

        A completion ends behind the token that ends its turn; what the template writes after that
        (a line break in ChatML) is left out, as a sampled answer ends there too.
        """
        if not rows:
            return []
        prompts = self._encode(self._opened([prompt for prompt, _ in rows], tools))
        sides = range(len(rows[0][1]))
        columns = [self._encode(self._whole(rows, number, tools)) for number in sides]
        joined = [
            self._join(prompt, wholes) for prompt, *wholes in zip(prompts, *columns, strict=True)
        ]
        if not formats:
            return joined
        given = tools or [None] * len(rows)
        return [
            answer if isinstance(answer, Problem) else self._with_formats(row, answer, offered)
            for row, answer, offered in zip(rows, joined, given, strict=True)
        ]

    def _with_formats(
        self, row: tuple[Prompt, Sequence[Prompt]], answer: Answered, tools: Tools
    ) -> Answered:
        prompt, completions = row
        masks = []
        for completion, ids in zip(completions, answer.completions, strict=True):
            whole = [*answer.prompt_ids, *ids]
            if isinstance(prompt, str) or isinstance(completion, str):
                mask = self.format_tokens.plain_mask(whole)
            else:
                mask = self.format_tokens.mask([*prompt, *completion], whole, tools)
            masks.append(mask[len(answer.prompt_ids) :])
        return replace(answer, formats=masks)

    def _opened(
        self, prompts: Sequence[Prompt], tools: Sequence[Tools] | None
    ) -> list[Layout | Problem]:
        if all(isinstance(prompt, str) for prompt in prompts):
            return [self.typesetter.plain(str(prompt)) for prompt in prompts]
        return self.typesetter.prompts([p for p in prompts if not isinstance(p, str)], tools)

    def _whole(
        self,
        rows: Sequence[tuple[Prompt, Sequence[Prompt]]],
        number: int,
        tools: Sequence[Tools] | None,
    ) -> list[Layout | Problem]:
        """Layouts of prompt and completion, with the completion as the only span."""
        if isinstance(rows[0][0], str):
            return [
                self.typesetter.plain(str(prompt), str(completions[number]))
                for prompt, completions in rows
            ]
        chats = [[*prompt, *completions[number]] for prompt, completions in rows]
        first = [len(prompt) for prompt, _ in rows]
        layouts = self.typesetter.chats(chats, first, tools)
        for layout in layouts:
            if isinstance(layout, Layout):
                layout.spans = [(layout.spans[0][0], layout.spans[-1][1])]
        return layouts

    def _join(
        self,
        prompt: tuple[Layout, Encoded] | Problem,
        wholes: Sequence[tuple[Layout, Encoded] | Problem],
    ) -> Answered | Problem:
        if isinstance(prompt, Problem):
            return prompt
        encoded = prompt[1]
        escaped, split, completions = False, False, []
        for whole in wholes:
            if isinstance(whole, Problem):
                return whole
            if not whole[0].follows:
                return Problem(
                    "the chat template writes the prompt differently once it is answered",
                    hint="give a template that only adds to a chat with model.chat_template_path",
                )
            answer = whole[1]
            if answer.ids[: answer.spans[0][0]] != encoded.ids:
                answer = self.encoder.in_pieces(whole[0])
            low, high = answer.spans[0]
            completions.append(answer.ids[low:high])
            escaped |= bool(whole[0].protected.originals)
            split |= answer.split
        ended = all(ids and ids[-1] in self.end_ids for ids in completions)
        return Answered(encoded.ids, completions, ended, escaped, split)

    def _sequences(
        self, layouts: Sequence[Layout | Problem], *, whole: bool = False
    ) -> list[Rendered | Problem]:
        results: list[Rendered | Problem] = []
        for item in self._encode(layouts):
            if isinstance(item, Problem):
                results.append(item)
                continue
            layout, encoded = item
            mask = [int(whole)] * len(encoded.ids)
            learned = [n not in layout.muted for n in range(len(encoded.spans))]
            for (low, high), on in zip(encoded.spans, learned, strict=True):
                mask[low:high] = [int(on)] * (high - low)
            ends = [end for (_, end), on in zip(encoded.spans, learned, strict=True) if on]
            last = ends[-1] if ends else 0
            ended = last > 0 and encoded.ids[last - 1] in self.end_ids
            escaped = bool(layout.protected.originals)
            muted = bool(layout.muted)
            results.append(Rendered(encoded.ids, mask, ended, escaped, encoded.split, muted))
        return results

    def _encode(
        self, layouts: Sequence[Layout | Problem]
    ) -> list[tuple[Layout, Encoded] | Problem]:
        sound = [layout for layout in layouts if isinstance(layout, Layout)]
        encoded = iter(self.encoder.encode(sound))
        results: list[tuple[Layout, Encoded] | Problem] = []
        for layout in layouts:
            if isinstance(layout, Problem):
                results.append(layout)
                continue
            item = next(encoded)
            results.append(item if isinstance(item, Problem) else (layout, item))
        return results


def _with_others(item: Rendered, chat: Turns, whole: bool) -> Rendered | Problem:
    """What the marks on turns of others than the assistant come to."""
    marks = [
        (number, turn["weight"])
        for number, turn in enumerate(chat, 1)
        if turn["role"] != "assistant" and turn.get("weight") is not None
    ]
    out = [number for number, weight in marks if weight == 0]
    if whole and out:
        return Problem(
            f"message {out[0]} is marked as not learned, and every token of the row is in the loss",
            hint="set data.assistant_only_loss: true, or take the mark out",
        )
    foreign = not whole and len(out) < len(marks)
    return replace(item, foreign=True) if foreign else item


def _only(outcomes: Sequence[Outcome | Problem]) -> Outcome:
    (outcome,) = outcomes
    if isinstance(outcome, Problem):
        raise AlignError(outcome)
    return outcome


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Turns,
    *,
    assistant_only: bool = True,
    tools: Tools = None,
) -> Rendered:
    """A whole chat as `apply_chat_template` tokenizes it, with the loss on the assistant's turns.

    Raises:
        AlignError: the tokenizer has no template, or the template refuses these turns.
    """
    return _only(Renderer(tokenizer).chats([messages], whole=not assistant_only, tools=[tools]))


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tools: Tools = None
) -> list[int]:
    """A prompt up to where the answer begins, as it is given to a model that answers it."""
    return _only(Renderer(tokenizer).prompts([prompt], [tools]))


def render_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt
) -> list[int]:
    """The ids that follow `render_prompt(prompt)`, the token that ends the turn included."""
    return _only(Renderer(tokenizer).answers([(prompt, [completion])])).completions[0]


def render_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chosen: Prompt, rejected: Prompt
) -> tuple[list[int], list[int], list[int]]:
    """Ids of a prompt and of two answers to it, each of which goes on behind the prompt."""
    row = _only(Renderer(tokenizer).answers([(prompt, [chosen, rejected])]))
    return row.prompt_ids, row.completions[0], row.completions[1]


def render_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Rendered:
    """A plain text between begin and end token, every token in the loss."""
    return _only(Renderer(tokenizer).texts([text]))
