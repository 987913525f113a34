"""Which tokens of a chat the template writes: headers, ends of turns, and the space around contents.

The Llama 3 paper (arXiv 2407.21783, section 4.1.4) leaves these tokens out of the DPO loss: they
stand in the chosen and in the rejected answer alike, and pushing one token up and down at once ends
in repeated tails or in answers that break off.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from align.data.conversations import Tools, Turns
from align.data.encoding import Encoder
from align.data.layout import STAND_INS, Typesetter

MARK = chr(STAND_INS[-1])
"""Stands for a content while the template is rendered."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What the template writes between two control tokens."""

    holds_content: bool
    before: tuple[int, ...] = ()
    """Ids in front of the first content."""
    after: tuple[int, ...] = ()
    """Ids behind the last content."""


class FormatTokens:
    """Finds the template's own tokens in encoded chats of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.typesetter = Typesetter(tokenizer)
        self.encoder = Encoder(tokenizer)
        self._stretches: dict[tuple[tuple[str, bool], ...], list[_Stretch] | None] = {}

    def mask(self, chat: Turns, ids: Sequence[int], tools: Tools = None) -> list[int]:
        """1 for every token of a whole chat that the template writes, 0 for the authors' tokens.

        Args:
            chat: the messages, prompt and answer together.
            ids: their token ids, as `Renderer` encodes them.
            tools: the functions that the chat offers.

        A call is its author's, whatever form the template gives it.

        A template that writes other control tokens for these contents than for short ones leaves
        only the control tokens themselves to be found.
        """
        control = self.encoder.control_ids
        stretches = self._of_shape(chat, tools)
        runs = _runs(ids, control)
        mask = [int(token in control) for token in ids]
        if stretches is None or len(stretches) != len(runs):
            return mask
        for (start, end), stretch in zip(runs, stretches, strict=True):
            inside = list(ids[start:end])
            if not stretch.holds_content:
                mask[start:end] = [1] * (end - start)
                continue
            lead, trail = len(stretch.before), len(stretch.after)
            if tuple(inside[:lead]) == stretch.before:
                mask[start : start + lead] = [1] * lead
            if trail and tuple(inside[-trail:]) == stretch.after:
                mask[end - trail : end] = [1] * trail
        return mask

    def plain_mask(self, ids: Sequence[int]) -> list[int]:
        """The same for plain text, where the begin and end tokens alone are no author's."""
        return [int(token in self.encoder.control_ids) for token in ids]

    def _of_shape(self, chat: Turns, tools: Tools) -> list[_Stretch] | None:
        shape = tuple(
            (turn["role"], bool(turn["content"].strip() or turn.get("tool_calls"))) for turn in chat
        )
        if tools:
            return self._render(shape, tools)
        if shape not in self._stretches:
            self._stretches[shape] = self._render(shape)
        return self._stretches[shape]

    def _render(
        self, shape: Sequence[tuple[str, bool]], tools: Tools = None
    ) -> list[_Stretch] | None:
        turns: list[Mapping[str, str]] = [
            {"role": role, "content": MARK if filled else ""} for role, filled in shape
        ]
        text = self.typesetter.written(turns, tools)
        if text is None:
            return None
        found = []
        for piece in self.typesetter.facts.pattern.split(text):
            first, last = piece.find(MARK), piece.rfind(MARK)
            if first < 0:
                found.append(_Stretch(False))
                continue
            before = self.encoder.as_text(piece[:first], first=not found)
            after = self.encoder.as_text(piece[last + 1 :], first=False)
            found.append(_Stretch(True, tuple(before), tuple(after)))
        return found


def _runs(ids: Sequence[int], control: frozenset[int]) -> list[tuple[int, int]]:
    """Start and end of what stands before, between and behind the control tokens."""
    places = [place for place, token in enumerate(ids) if token in control]
    starts = [0, *(place + 1 for place in places)]
    return list(zip(starts, [*places, len(ids)], strict=True))
