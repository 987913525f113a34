"""Gradients of all processes, added up."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

BUCKET = 1 << 24
"""Numbers of gradients that are added up at once: 64 MiB."""


def sum_over_processes(gradients: Sequence[Tensor]) -> None:
    """Add up gradients over all processes, in place, and in float32 whatever their type.

    Small ones travel together and large ones alone, so that no copy of all of them is made (32 GB for a full 8B).
    """
    parts: list[Tensor] = []
    for gradient in gradients:
        if parts and sum(part.numel() for part in parts) + gradient.numel() > BUCKET:
            _sum_together(parts)
            parts = []
        parts.append(gradient)
    if parts:
        _sum_together(parts)


def _sum_together(gradients: list[Tensor]) -> None:
    first = gradients[0]
    if len(gradients) == 1 and first.dtype is torch.float32 and first.is_contiguous():
        distributed.all_reduce(first)
        return
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))
