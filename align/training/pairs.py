"""Batches of preference pairs whose common beginning is computed once, without padding.

Trainer, loss, head and wrappers (PEFT, DDP) see the padded batch that they know. Only the backbone gets it as one row
of the tokens that differ, and gives its hidden states back in the padded places.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from align.generation.sampler import unwrapped
from align.training.flat import Segment, segments_attended

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far hidden states may lie from those of the padded batch, as a share of their largest: at most in float32, in
the mean in reduced precision."""


class SharedPairs(NamedTuple):
    """A padded batch of B pairs as a row of N tokens: a chosen sequence whole, then what only its rejected one has."""

    ids: Tensor
    """Shape [1, N]."""
    positions: Tensor
    """Of each token in its own sequence, shape [1, N]."""
    segments: list[Segment]
    places: Tensor
    """Where in the row every cell of the batch is found, shape [2B, L]; 0 for padding."""


def share(ids: Tensor, mask: Tensor) -> SharedPairs:
    """Lay out a batch.

    Args:
        ids: token ids, shape [2B, L], chosen sequences first, filled up on the right.
        mask: 1 for tokens, 0 for padding, same shape.
    """
    both, tokens = len(ids) // 2, mask.bool()
    alike = (ids[:both] == ids[both:]) & tokens[:both] & tokens[both:]
    lengths = tokens.sum(1)
    # Each side keeps a token of its own, behind which something is predicted or scored.
    shared = alike.cumprod(1).sum(1).minimum(lengths[:both] - 1).minimum(lengths[both:] - 1)
    columns = torch.arange(ids.shape[1], device=ids.device)
    kept = tokens.clone()
    kept[both:] &= columns >= shared[:, None]
    # Side by side: chosen and rejected of the first pair, then of the second, ...
    order = torch.arange(2 * both, device=ids.device).view(2, both).t().reshape(-1)
    row = kept[order]
    places = torch.zeros_like(ids)
    places[order] = torch.where(row, row.reshape(-1).cumsum(0).view_as(row) - 1, 0)
    inherited = columns < shared[:, None]
    places[both:] = torch.where(inherited, places[:both], places[both:])
    segments = []
    for chosen, rejected, common in zip(
        *(part.tolist() for part in (lengths[:both], lengths[both:], shared)), strict=True
    ):
        segments += [Segment(chosen), Segment(rejected - common, common)]
    positions = columns.expand_as(ids)
    return SharedPairs(ids[order][row][None], positions[order][row][None], segments, places)


@contextmanager
def pairs_shared(*models: Any) -> Iterator[None]:
    """Let the backbones of these models (of sequence classifiers or language models) compute padded batches of
    pairs as `SharedPairs`. The backward pass belongs inside too: gradient checkpointing computes layers again there.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(segments_attended(model))
            for hook in _hooks(model):
                stack.callback(hook.remove)
        yield


def _hooks(model: Any) -> Iterator[Any]:
    base = unwrapped(model)
    backbone = getattr(base, base.base_model_prefix)
    layouts: list[SharedPairs] = []  # of the pass that is under way

    def before(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rest = dict(given)
        ids = args[0] if args else rest.pop("input_ids")
        layout = share(ids, rest.pop("attention_mask"))
        layouts.append(layout)
        row = {"input_ids": layout.ids, "position_ids": layout.positions, "use_cache": False}
        return (), rest | row | {"segments": layout.segments}

    def after(_: Any, __: Any, output: Any) -> Any:
        layout = layouts.pop()
        output.last_hidden_state = output.last_hidden_state[0][layout.places]
        return output

    yield backbone.register_forward_pre_hook(before, with_kwargs=True)
    yield backbone.register_forward_hook(after)


def agrees_with_padding(model: Any, ids: Tensor, mask: Tensor) -> bool:
    """Whether the backbone gives the same hidden states for a batch of pairs either way."""
    base = unwrapped(model)
    training = base.training
    base.eval()
    try:
        wanted = _states(model, ids, mask)
        with pairs_shared(model):
            found = _states(model, ids, mask)
    finally:
        base.train(training)
    tokens = mask.bool()
    wanted, found = wanted[tokens].float(), found[tokens].float()
    gaps = (found - wanted).abs()
    gap = float(gaps.max() if base.dtype is torch.float32 else gaps.mean())
    return gap <= TOLERANCE.get(base.dtype, 1e-3) * float(wanted.abs().max())


@torch.no_grad()  # type: ignore[untyped-decorator]
def _states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The backbone's last hidden states."""
    base = unwrapped(model)
    backbone = getattr(base, base.base_model_prefix)
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if not isinstance(model, FSDPModule):
        alone: Tensor = backbone(**given).last_hidden_state
        return alone
    # FSDP2 brings weights together in passes of the whole model only. (ZeRO-3 does it in each module, and one that
    # began with a head in evaluation would not find it in training.)
    found: list[Tensor] = []
    kept = backbone.register_forward_hook(
        lambda _, __, output: found.append(output.last_hidden_state)
    )
    few = {"logits_to_keep": 1} if "logits_to_keep" in signature(base.forward).parameters else {}
    try:
        model(**given, **few)
    finally:
        kept.remove()
    return found[0]
