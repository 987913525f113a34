"""`align inspect`: what a stage really trains on, token by token."""

import json
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from align.config.sections import ModelSection, StageConfig
from align.data.rendering import RenderedData, prompt_rows, training_rows
from align.errors import fail
from align.models.tokenizer import chat_facts, load_tokenizer
from align.report.terminal import console, sanitise
from align.stages.dpo import DPOConfig
from align.stages.evaluate import EvalConfig
from align.stages.reward import RewardConfig
from align.stages.sample import SampleConfig
from align.stages.sft import SFTConfig

IN_LOSS, OUTSIDE, CONTROL = "bold green", "dim", "cyan"
OPEN, CLOSE = "⟦", "⟧"
"""Around the tokens in the loss, for terminals without colour."""
LINE_BREAK = "⏎"
REPLACEMENT = "\ufffd"
"""What a decoder writes for the bytes of an unfinished character."""
LONGEST_CHARACTER = 4


@dataclass(frozen=True)
class Sequence:
    """One sequence of a row, as it goes into the model."""

    row: int
    """Counted from 1."""
    side: str | None
    """`chosen` or `rejected` in a pair."""
    ids: list[int]
    loss_mask: list[int]
    """1 for the tokens in the loss; in a pair for the answer."""

    def as_json(self) -> str:
        """One line: ids and mask, with row and side in a pair."""
        place = {"row": self.row, "side": self.side} if self.side else {}
        return json.dumps(place | {"ids": self.ids, "loss_mask": self.loss_mask})


def inspect_stage(config: StageConfig, *, rows: int = 3, as_json: bool = False) -> None:
    """Print counts and the first rows of a stage, tokens coloured by whether they are in the loss.

    Needs the tokenizer, not the weights.

    Args:
        config: a stage's config.
        rows: rows to print, at most.
        as_json: print one JSON object for each row (two for a pair) and nothing else.

    Raises:
        AlignError: what the stage itself would refuse in its rows.
    """
    tokenizer = stage_tokenizer(config)
    data = stage_rows(config, tokenizer)
    shown = list(sequences(data, rows))
    if as_json:
        for sequence in shown:
            print(sequence.as_json())
        return
    out = console(results=True)
    for note in [*data.notes, *_packing(config, data)]:
        out.print(Text(sanitise(note)), soft_wrap=True)
    for sequence in shown:
        side = f", {sequence.side}" if sequence.side else ""
        counts = f"{len(sequence.ids)} tokens, {sum(sequence.loss_mask)} in the loss"
        out.print(Text(f"\nrow {sequence.row}{side}: {counts}", style="bold"))
        out.print(coloured(tokenizer, sequence.ids, sequence.loss_mask), soft_wrap=True)


def stage_tokenizer(config: StageConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a stage; for `eval` that of the first model."""
    if isinstance(config, EvalConfig):
        return load_tokenizer(ModelSection(model_name_or_path=next(iter(config.models.values()))))
    if isinstance(config, SFTConfig | RewardConfig | DPOConfig | SampleConfig):
        return load_tokenizer(config.model)
    fail("reads no rows, so there is nothing to inspect", where=type(config).__name__)


def stage_rows(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> RenderedData:
    """The rows that the stage would read, rendered as it would render them."""
    if isinstance(config, SFTConfig):
        only = config.data.assistant_only_loss
        return training_rows(config.data, tokenizer, "sft", assistant_only=only)
    if isinstance(config, RewardConfig):
        # As pairs with their prompt apart, so that the answers can be told from it.
        margin = config.use_margin
        return training_rows(config.data, tokenizer, "dpo", require_margin=margin)
    if isinstance(config, DPOConfig):
        return training_rows(config.data, tokenizer, "dpo", mask_format=config.mask_format_tokens)
    if isinstance(config, SampleConfig | EvalConfig):
        return prompt_rows(config.data, tokenizer)
    fail("reads no rows, so there is nothing to inspect", where=type(config).__name__)


def sequences(data: RenderedData, rows: int) -> Iterator[Sequence]:
    """The sequences of the first rows: one each, or two for a pair."""
    names = data.train.column_names
    for number, row in enumerate(data.train.select(range(min(rows, len(data.train)))), 1):
        if "input_ids" in names:
            yield Sequence(number, None, row["input_ids"], [int(i != -100) for i in row["labels"]])
        elif "chosen_ids" in names:
            prompt = row["prompt_ids"]
            for side in ("chosen", "rejected"):
                answer = row[f"{side}_ids"]
                mask = [0] * len(prompt) + (row.get(f"{side}_mask") or [1] * len(answer))
                yield Sequence(number, side, prompt + answer, mask)
        else:
            yield Sequence(number, None, row["prompt_ids"], [0] * len(row["prompt_ids"]))


def coloured(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[int]) -> Text:
    """The tokens as text: in the loss or not, control tokens and line breaks visible."""
    control = set(chat_facts(tokenizer).control.values())
    text, inside = Text(), False
    for piece, token, on in _characters(tokenizer, ids, mask):
        if on != inside:
            text.append(OPEN if on else CLOSE, style=IN_LOSS)
            inside = on
        style = IN_LOSS if on else OUTSIDE
        style = f"{style} {CONTROL}" if token in control else style
        text.append(sanitise(piece).replace("\n", f"{LINE_BREAK}\n"), style=style)
    if inside:
        text.append(CLOSE, style=IN_LOSS)
    return text


def _characters(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[int]
) -> Iterator[tuple[str, int, bool]]:
    """Text, first token and mask of each token; tokens that share a character go together."""
    held: list[int] = []
    for place, token in enumerate(ids):
        held.append(token)
        piece = str(tokenizer.decode(held, clean_up_tokenization_spaces=False))
        last = place + 1 == len(ids) or mask[place + 1] != mask[place]
        if not piece.endswith(REPLACEMENT) or len(held) == LONGEST_CHARACTER or last:
            yield piece, held[0], bool(mask[place])
            held = []


def _packing(config: StageConfig, data: RenderedData) -> list[str]:
    if not isinstance(config, SFTConfig) or not config.data.packing:
        return []
    size = config.data.max_length
    if size is None:
        fail("packing needs a length to fill", where="data.max_length", hint="set it")
    lengths = [len(ids) for ids in data.train["input_ids"]]
    count = packed_sequences(lengths, size)
    filled = sum(lengths) / (count * size)
    return [f"packed into {count:,} sequences of at most {size} tokens, {filled:.1%} full"]


def packed_sequences(lengths: list[int], size: int) -> int:
    """Sequences that best-fit-decreasing packing makes of rows, none of which is cut.

    Every row, longest first, goes into the fullest sequence that still has room for it.
    """
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else size
        insort(rooms, room - length)
    return len(rooms)
