"""Preference pairs whose common beginning is computed once, without padding, for a sequence classifier."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.reward_trainer import DataCollatorForPreference

from align.generation.sampler import unwrapped
from align.training.flat import Segment, segments_attended

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far rewards may lie from those of the padded batch, as a share of the largest (or of 1)."""


def shared_tokens(chosen: list[int], rejected: list[int]) -> int:
    """Tokens with which both begin; each keeps at least one of its own, to stand for the answer."""
    both = zip(chosen[:-1], rejected[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))


class SharedPairs(DataCollatorForPreference):  # type: ignore[misc]
    """Pairs end to end in one row of N tokens: each chosen sequence whole, then what only the rejected one has.

    Reads `chosen_ids` and `rejected_ids` (whole sequences) and, where given, `margin`. A batch of B pairs:

    * `last`: place of every sequence's last token, shape [2B], chosen ones first;
    * `input_ids`, `position_ids`, `attention_mask`: shape [1, N];
    * `segments`: the fields of `Segment`, shape [2B, 2], in the order of the row.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        last: tuple[list[int], list[int]] = ([], [])
        for example in examples:
            chosen, rejected = example["chosen_ids"], example["rejected_ids"]
            shared, start = shared_tokens(chosen, rejected), len(ids)
            ids += [*chosen, *rejected[shared:]]
            positions += [*range(len(chosen)), *range(shared, len(rejected))]
            segments += [Segment(len(chosen)), Segment(len(rejected) - shared, shared)]
            last[0].append(start + len(chosen) - 1)
            last[1].append(len(ids) - 1)
        batch = {
            "last": torch.tensor([*last[0], *last[1]]),  # first: its length is the batch's size
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "segments": torch.tensor(segments),
        }
        if "margin" in examples[0]:
            batch["margin"] = torch.tensor([example["margin"] for example in examples]).float()
        return batch


def padded(batch: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """The same pairs as TRL's collator gives them: one row a sequence, chosen ones first."""
    segments = batch["segments"].tolist()
    parts = batch["input_ids"][0].split([length for length, _ in segments])
    chosen, rejected = parts[::2], parts[1::2]
    shared = [shared for _, shared in segments[1::2]]
    whole = [
        torch.cat([one[:length], other])
        for one, other, length in zip(chosen, rejected, shared, strict=True)
    ]
    rows = [*chosen, *whole]
    ones = [torch.ones_like(row) for row in rows]
    rest = {"margin": batch["margin"]} if "margin" in batch else {}
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(ones, batch_first=True),
        **rest,
    }


@contextmanager
def pairs_read(model: Any, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Inputs with which the classifier `model` gives the rewards of the batch, shape [2B, 1].

    Its backbone gets the flat row in place of these inputs, and hands on the last tokens' states, shape
    [2B, 1, d], so that head, wrappers (PEFT, DDP) and loss are the model's and TRL's own. The backward pass
    belongs inside `segments_attended`.
    """
    base = unwrapped(model)
    backbone = getattr(base, base.base_model_prefix)
    ids, last = batch["input_ids"], batch["last"]
    segments = [Segment(*fields) for fields in batch["segments"].tolist()]

    def before(_: Any, __: Any, given: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        outputs = {name: value for name, value in given.items() if name.startswith("output_")}
        row = {"input_ids": ids, "position_ids": batch["position_ids"], "segments": segments}
        return (), {**outputs, **row, "use_cache": False}

    def after(_: Any, __: Any, output: Any) -> Any:
        return type(output)(last_hidden_state=output.last_hidden_state[0, last][:, None])

    hooks = [
        backbone.register_forward_pre_hook(before, with_kwargs=True),
        backbone.register_forward_hook(after),
    ]
    rest = {"margin": batch["margin"]} if "margin" in batch else {}
    try:
        yield {
            "input_ids": ids[0, last][:, None],
            "attention_mask": batch["attention_mask"],
            **rest,
        }
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()  # type: ignore[untyped-decorator]
def agrees_with_padding(model: Any, batch: dict[str, Tensor], pad_token_id: int) -> bool:
    """Whether the flat row gives this batch the rewards that the padded rows give it."""
    base = unwrapped(model)
    training = base.training
    base.eval()
    try:
        rows = padded(batch, pad_token_id)
        rows.pop("margin", None)
        wanted = base(**rows, use_cache=False).logits.float()
        with segments_attended(model), pairs_read(model, batch) as inputs:
            inputs.pop("margin", None)
            found = base(**inputs, use_cache=False).logits.float()
    finally:
        base.train(training)
    allowed = TOLERANCE.get(base.dtype, 1e-3) * max(1.0, float(wanted.abs().max()))
    return float((found - wanted).abs().max()) <= allowed
