"""Laid-out text to token ids, with the places of the spans.

A text is tokenized in one go, so its ids are those of `apply_chat_template`. Two kinds of rows go
piece by piece instead: those with a control token written in a message, which has to stay text, and
those where prompt and answer in one go would have other tokens than the prompt alone, which is all
that a model sees at generation time.
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

LONGEST_HEADER = 40
"""Characters of a text whose tokens are worth remembering."""


SWALLOWED = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
"""White space as Unicode and the tokenizers library have it; Python's `strip` takes a few more."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a layout."""

    ids: list[int]
    spans: list[Span]
    """The layout's spans in tokens."""
    split: bool = False
    """Whether the text was cut at the start of a span, as its tokens in one go are others."""


class Encoder:
    """Encodes layouts in batches with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.facts = chat_facts(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self._swallow_after = {token.content for token in added if token.rstrip}
        self._swallow_before = {token.content for token in added if token.lstrip}
        # The unknown token stands for ordinary text, where it is nothing else as well.
        unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self.control_ids = frozenset(self.facts.control.values()) - unknown
        self._headers: dict[tuple[str, bool], list[int]] = {}
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
            found = tuple(i for i in encoded.ids if i in self.control_ids)
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
            starts = [bisect_left(offsets, cut, key=itemgetter(0)) for cut in layout.cuts]
            places = zip(layout.cuts, starts, strict=True)
            if all(self._prompt_ends_here(layout.text, ids, offsets, *pair) for pair in places):
                yield Encoded(ids, [_tokens(offsets, span) for span in layout.spans])
            else:
                yield self.in_pieces(layout)

    def _prompt_ends_here(
        self, text: str, ids: Sequence[int], offsets: Sequence[Span], start: int, low: int
    ) -> bool:
        """Whether the text in front of an answer has the same tokens when nothing follows it.

        A token may reach across the start, and in some vocabularies the last white space is
        tokenized by what follows. Only the text behind the last control token can differ.
        """
        behind = low
        while behind and ids[behind - 1] not in self.control_ids:
            behind -= 1
        position = offsets[behind - 1][1] if behind else 0
        return list(ids[behind:low]) == self._alone(text[position:start], not behind)

    def _alone(self, text: str, first: bool) -> list[int]:
        """Ids of a text between control tokens; short ones, a header's, come again and again."""
        key = (text, first)
        if key in self._headers:
            return self._headers[key]
        ids = self._ids(text, first) if text else []
        if len(text) <= LONGEST_HEADER:
            self._headers[key] = ids
        return ids

    def in_pieces(self, layout: Layout) -> Encoded:
        """Encode with cuts where answers begin and end, and around every control token."""
        starts = {start: number for number, (start, _) in enumerate(layout.spans)}
        ends = {end: number for number, (_, end) in enumerate(layout.spans)}
        ids: list[int] = []
        places = [[0, 0] for _ in layout.spans]
        for start, end, piece in self._pieces(layout, sorted({*layout.cuts, *starts, *ends})):
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
                    piece = piece.lstrip(SWALLOWED)
                if high == start and token in self._swallow_before:
                    piece = piece.rstrip(SWALLOWED)
                yield low, high, self.as_text(piece, first=low == 0)
            if token:
                yield start, end, [self.facts.control[token]]
            position, swallow = end, token in self._swallow_after

    def as_text(self, text: str, *, first: bool = True) -> list[int]:
        """The ids of a text none of which is a control token, whatever the text says."""
        if not text:
            return []
        ids = self._ids(text, first)
        if self.control_ids.isdisjoint(ids):
            return ids
        # Not special in this vocabulary, or a word of it: break the token's name apart.
        ids, position = [], 0
        for match in self.facts.pattern.finditer(text):
            cut = match.start() + 1
            ids += self._ids(text[position:cut], first and position == 0)
            position = cut
        ids += self._ids(text[position:], False)
        if self.control_ids.isdisjoint(ids):
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


def _tokens(offsets: Sequence[Span], span: Span) -> Span:
    """The tokens that hold the characters of a span."""
    low = bisect_left(offsets, span[0], key=itemgetter(0))
    return low, bisect_left(offsets, span[1], low, key=itemgetter(0))


def _stray(layout: Layout) -> Problem:
    text = layout.protected.restore(layout.text)
    return Problem(
        f"its control tokens are not those that the template writes for such turns: {text[:80]!r}",
        hint="take the control tokens out of the row, or check the chat template",
    )
