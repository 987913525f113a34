"""Log-probabilities from hidden states and the output head, without the logits of all tokens in memory."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS_AT_ONCE = 512
COLUMNS_AT_ONCE = 8192
"""A tile of logits: so many tokens times so many entries of the vocabulary."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropies.

    The logits of a tile are made, summed up and forgotten. Where the head is frozen (LoRA), its gradient
    d logp / d hidden = (weight[target] - sum_v p_v weight[v]) / temperature is summed up in the same pass, like
    the output of attention, so that training costs two matrix products and recomputes nothing. Where the head
    is trained too, each block of rows is computed again in the backward pass.

    Args:
        hidden: shape [n, d]. weight: the head's, shape [vocabulary, d], no bias.
        targets: token ids, shape [n].
        temperature: divides the logits.

    Returns:
        log-probabilities, float32, shape [n], and entropies in nats without a gradient, shape [n].
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return _with_trained_head(hidden, weight, targets, temperature)
    found: tuple[Tensor, Tensor] = _FrozenHead.apply(hidden, weight, targets, temperature)
    return found


def _with_trained_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    def block(rows: Tensor, head: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        scores = (rows @ head.t()).float() / temperature
        logs = scores.log_softmax(-1)
        entropy = -(logs.detach().exp() * logs.detach()).sum(-1)
        return logs.gather(1, wanted[:, None]).squeeze(1), entropy

    parts = [
        checkpoint(block, rows, weight, wanted, use_reentrant=False)
        for rows, wanted in zip(
            hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True
        )
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


class _FrozenHead(torch.autograd.Function):  # type: ignore[misc]
    """Tiles over rows and vocabulary with a running maximum, as softmax attention does it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        slopes = torch.empty_like(hidden) if wants_gradient else None
        for first in range(0, len(hidden), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            total, spread, mean_weight = _online_softmax(
                hidden[rows], weight, temperature, keep_mean=wants_gradient
            )
            chosen = weight[targets[rows]]
            score = torch.linalg.vecdot(hidden[rows].float(), chosen.float()) / temperature
            logprobs[rows] = score - total
            entropies[rows] = spread
            if slopes is not None and mean_weight is not None:
                slopes[rows] = ((chosen.float() - mean_weight) / temperature).to(hidden.dtype)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0][:, None].to(slopes.dtype), None, None, None


def _online_softmax(
    hidden: Tensor, weight: Tensor, temperature: float, *, keep_mean: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log of the partition sum [n], entropy [n], and the mean of the head's rows [n, d] if asked for."""
    count = len(hidden)
    top = hidden.new_full((count, 1), -math.inf, dtype=torch.float32)
    mass = torch.zeros_like(top)
    weighted = torch.zeros_like(top)  # sum of exp(z - top) * (z - top)
    mean = hidden.new_zeros(hidden.shape, dtype=torch.float32) if keep_mean else None
    for columns in weight.split(COLUMNS_AT_ONCE):
        scores = (hidden @ columns.t()).float().div_(temperature)
        highest = torch.maximum(top, scores.amax(-1, keepdim=True))
        scores.sub_(highest)
        powers = scores.exp()
        shift = torch.where(mass > 0, top - highest, torch.zeros_like(top))
        shrink = torch.where(mass > 0, shift.exp(), torch.zeros_like(top))
        weighted = shrink * (weighted + shift * mass) + torch.linalg.vecdot(powers, scores)[:, None]
        mass = shrink * mass + powers.sum(-1, keepdim=True)
        if mean is not None:
            product = powers.to(columns.dtype) @ columns
            mean = mean.mul_(shrink).add_(product)
        top = highest
    logs = mass.log()
    entropy = logs - weighted / mass
    if mean is not None:
        mean = mean / mass
    return (top + logs).squeeze(1), entropy.squeeze(1), mean
