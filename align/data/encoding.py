"""Laid-out text to token ids, with the places of the spans.

A text is tokenized in one go, so its ids are those of `apply_chat_template`. Two kinds of rows go
piece by piece instead: those with a control token written in a message, which has to stay text, and
those where a token would reach across the start of an answer, while at generation time the prompt
ends there.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

from transformers import PreTrainedTokenizerBase

from align.data.layout import Layout, Span
from align.errors import Problem
from align.models.tokenizer import chat_facts


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a layout."""

    ids: list[int]
    spans: list[Span]
    """The layout's spans in tokens."""
    split: bool = False
    """Whether a token that reached across the start of a span was split there."""


class Encoder:
    """Encodes layouts in batches with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.facts = chat_facts(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self._swallow_after = {token.content for token in added if token.rstrip}
        self._swallow_before = {token.content for token in added if token.lstrip}
        self._control_ids = frozenset(self.facts.control.values())
        self._line_feed = self._ids("\n")
        # SentencePiece vocabularies put a space in front of a text, which pieces must not get.
        self._leads = self._ids("\na") != [*self._line_feed, *self._ids("a")]

    def encode(self, layouts: Sequence[Layout]) -> list[Encoded | Problem]:
        """The ids of each layout; a Problem where the control tokens are not the template's own."""
        whole = [layout for layout in layouts if not layout.protected.originals]
        batch = iter(self._in_one_go(whole))
        results: list[Encoded | Problem] = []
        for layout in layouts:
            encoded = self.in_pieces(layout) if layout.protected.originals else next(batch)
            found = tuple(i for i in encoded.ids if i in self._control_ids)
            results.append(encoded if found == layout.control else _stray(layout))
        return results

    def _in_one_go(self, layouts: Sequence[Layout]) -> Iterator[Encoded]:
        if not layouts:
            return
        batch = self.tokenizer(
            [layout.text for layout in layouts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        rows = zip(layouts, batch["input_ids"], batch["offset_mapping"], strict=True)
        for layout, ids, offsets in rows:
            spans = []
            for start, end in layout.spans:
                low = bisect_left(offsets, start, key=itemgetter(0))
                if low and offsets[low - 1][1] > start:
                    yield self.in_pieces(layout)
                    break
                spans.append((low, bisect_left(offsets, end, low, key=itemgetter(0))))
            else:
                yield Encoded(ids, spans)

    def in_pieces(self, layout: Layout) -> Encoded:
        """Encode with a cut at both ends of every span and around every control token."""
        starts = {start: number for number, (start, _) in enumerate(layout.spans)}
        ends = {end: number for number, (_, end) in enumerate(layout.spans)}
        ids: list[int] = []
        places = [[0, 0] for _ in layout.spans]
        for start, end, piece in self._pieces(layout, sorted({*starts, *ends})):
            if start in starts:
                places[starts[start]][0] = len(ids)
            ids += piece
            if end in ends:
                places[ends[end]][1] = len(ids)
        split = not layout.protected.originals
        return Encoded(ids, [(low, high) for low, high in places], split)

    def _pieces(self, layout: Layout, cuts: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        """Start, end and ids of each piece: a control token of the template, or text between."""
        position, swallow, text = 0, False, layout.text
        matches = [(m.start(), m.end(), m.group()) for m in self.facts.pattern.finditer(text)]
        for start, end, token in [*matches, (len(text), len(text), "")]:
            inner = [cut for cut in cuts if position < cut < start]
            edges = [position, *inner, start]
            for low, high in pairwise(edges):
                piece = layout.protected.restore(text[low:high])
                if swallow:
                    piece = piece.lstrip()
                if high == start and token in self._swallow_before:
                    piece = piece.rstrip()
                yield low, high, self.as_text(piece, first=low == 0)
            if token:
                yield start, end, [self.facts.control[token]]
            position, swallow = end, token in self._swallow_after

    def as_text(self, text: str, *, first: bool = True) -> list[int]:
        """The ids of a text none of which is a control token, whatever the text says."""
        if not text:
            return []
        ids = self._ids(text, first)
        if self._control_ids.isdisjoint(ids):
            return ids
        # Not special in this vocabulary, or a word of it: break the token's name apart.
        ids, position = [], 0
        for match in self.facts.pattern.finditer(text):
            cut = match.start() + 1
            ids += self._ids(text[position:cut], first and position == 0)
            position = cut
        ids += self._ids(text[position:], False)
        if self._control_ids.isdisjoint(ids):
            return ids
        return [i for character in text for i in self._ids(character, False)]

    def _ids(self, text: str, first: bool = True) -> list[int]:
        def encode(piece: str) -> list[int]:
            encoded: list[int] = self.tokenizer(
                piece, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
            return encoded

        if first or not self._leads:
            return encode(text)
        behind_line_feed = encode("\n" + text)
        size = len(self._line_feed)
        if behind_line_feed[:size] == self._line_feed:
            return behind_line_feed[size:]
        return encode(text)


def _stray(layout: Layout) -> Problem:
    text = layout.protected.restore(layout.text)
    return Problem(
        f"its control tokens are not those that the template writes for such turns: {text[:80]!r}",
        hint="take the control tokens out of the row, or check the chat template",
    )
