"""Sequences end to end in one row, without padding, and the attention that keeps them apart."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from align.generation.sampler import has_attention_caches, unwrapped

SEGMENTS = "align_segments"
"""Name of the attention below among transformers' attention functions."""


class Segment(NamedTuple):
    """Neighbouring tokens of a flat row that attend to each other."""

    length: int
    shared: int = 0
    """They continue so many tokens: those at the beginning of the nearest segment to the left that shares none."""


@dataclass(frozen=True, slots=True)
class Flat:
    """A batch of prompts and completions as one row of N tokens."""

    ids: Tensor
    """Token ids, shape [N]."""
    positions: Tensor
    """Position of each token in its own sequence, shape [N]."""
    lengths: list[int]
    """Tokens of each sequence."""
    rows: Tensor
    """Places whose hidden states predict the completion tokens, episode by episode, shape [n]."""
    targets: Tensor
    """The completion tokens, shape [n]."""
    last: Tensor
    """Place of each sequence's last token, shape [sequences]."""


def flatten(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device
) -> Flat:
    """Lay prompts and their completions (none empty) end to end."""
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    lengths: list[int] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        first = len(ids) + len(prompt) - 1
        ids += [*prompt, *completion]
        length = len(prompt) + len(completion)
        positions += range(length)
        rows += range(first, first + len(completion))
        lengths.append(length)
    ends = torch.tensor(lengths).cumsum(0) - 1
    targets = [token for completion in completions for token in completion]
    return Flat(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        lengths,
        torch.tensor(rows, device=device),
        torch.tensor(targets, device=device),
        ends.to(device),
    )


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Sequence[Segment],
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment of one row, and to the tokens that the segment continues.

    Args:
        query, key, value: shape [1, heads, N, size].
        segments: of the whole row, in order; what they share is read, not computed again.
        dropout: of the weights. scaling: of the scores. sliding_window: keys further back are not seen.

    Returns:
        shape [1, N, heads, size], and no weights.
    """
    lengths = [segment.length for segment in segments]
    # One split: the gradient of a slice would be a row of zeros for each segment.
    rows = zip(segments, *(part.split(lengths, 2) for part in (query, key, value)), strict=True)
    grouped = query.shape[1] > key.shape[1]
    whole_keys, whole_values = key, value  # of the nearest segment that shares nothing
    parts = []
    for (_, shared), queries, keys, values in rows:
        if shared:
            keys = torch.cat([whole_keys[:, :, :shared], keys], 2)
            values = torch.cat([whole_values[:, :, :shared], values], 2)
        else:
            whole_keys, whole_values = keys, values
        length = keys.shape[2]
        near = sliding_window is not None and length > sliding_window
        mask = _mask(length, shared, sliding_window, query.device) if near or shared else None
        parts.append(
            functional.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _mask(length: int, shared: int, window: int | None, device: torch.device) -> Tensor:
    """What the tokens behind the shared ones see of all, shape [length - shared, length]."""
    places = torch.arange(length, device=device)
    back = places[shared:, None] - places
    return (back >= 0) & (back < (window or length))


AttentionInterface.register(SEGMENTS, segment_attention)
AttentionMaskInterface.register(SEGMENTS, lambda *_, **__: None)


def can_flatten(model: Any) -> bool:
    """Whether every layer is plain attention that transformers lets a function replace.

    Layers with a recurrent state, attention sinks, capped scores or chunks are not: these models get padding.
    """
    base = unwrapped(model)
    config = base.config.get_text_config()
    odd = getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss"
    # A chunk (Llama 4) is told to a layer by its mask alone.
    odd = odd or getattr(config, "attention_chunk_size", None)
    return bool(
        getattr(base, "_supports_attention_backend", False)
        and has_attention_caches(model)
        and not odd
    )


@contextmanager
def segments_attended(model: Any) -> Iterator[None]:
    """Let the model attend inside segments. The backward pass belongs inside too: gradient checkpointing
    computes layers again there."""
    config = unwrapped(model).config
    before = config._attn_implementation
    config._attn_implementation = SEGMENTS
    try:
        yield
    finally:
        config._attn_implementation = before


def hidden_states(model: Any, flat: Flat, *, padded: bool = False) -> Tensor:
    """Last hidden states of every token, shape [N, d], in the order of the flat row.

    Args:
        model: a causal language model or classifier, or a PeftModel of one, with the adapter that is meant active.
        padded: compute a padded batch instead (models that `can_flatten` refuses).
    """
    base = unwrapped(model)
    backbone = getattr(base, base.base_model_prefix)
    if padded:
        return _padded(backbone, flat)
    segments = [Segment(length) for length in flat.lengths]
    with segments_attended(model):
        found: Tensor = backbone(
            input_ids=flat.ids[None],
            position_ids=flat.positions[None],
            use_cache=False,
            segments=segments,
        )[0]
    return found[0]


def in_rows(flat: Flat) -> tuple[Tensor, Tensor, Tensor]:
    """The sequences as rows filled up on the right: mask, ids and positions, shape [sequences, longest] each.

    `found[mask]` brings what a model gives for them back into the order of the flat row.
    """
    lengths = torch.tensor(flat.lengths, device=flat.ids.device)
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    ids, positions = (torch.zeros_like(mask, dtype=torch.long) for _ in range(2))
    ids[mask], positions[mask] = flat.ids, flat.positions
    return mask, ids, positions


def _padded(backbone: Any, flat: Flat) -> Tensor:
    mask, ids, positions = in_rows(flat)
    found: Tensor = backbone(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False
    )[0]
    return found[mask]
