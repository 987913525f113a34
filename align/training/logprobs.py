"""Log-probabilities from hidden states and the output head, without the logits of all tokens in memory."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS_AT_ONCE = 512
COLUMNS_AT_ONCE = 2048
"""A tile of logits: so many tokens times so many entries of the vocabulary (4 MiB, which stays in a cache)."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropies.

    The logits of a tile are made, summed up and forgotten. Where the head is frozen (LoRA), its gradient
    d logp / d hidden = (weight[target] - sum_v p_v weight[v]) / temperature is summed up in the same pass, like
    the output of attention, so that training costs two matrix products and recomputes nothing. Where the head
    is trained too, each block of rows is computed again in the backward pass.

    Args:
        hidden: shape [n, d]. weight: the head's, shape [vocabulary, d], no bias.
        targets: token ids, shape [n].
        temperature: divides the logits.
        entropy: whether entropies are wanted; they cost a pass over every tile.

    Returns:
        log-probabilities, float32, shape [n], and entropies in nats without a gradient, shape [n], or None.
    """
    hidden = hidden.to(weight.dtype)
    # Autocast would round sums and single logits, by up to an eighth of a nat.
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.requires_grad and torch.is_grad_enabled():
            return _with_trained_head(hidden, weight, targets, temperature, entropy)
        logprobs, entropies = _FrozenHead.apply(hidden, weight, targets, temperature, entropy)
    return logprobs, entropies if entropy else None


def _with_trained_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    def block(rows: Tensor, head: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        scores = (rows @ head.t()).float() / temperature
        logs = scores.log_softmax(-1)
        seen = logs.detach()
        spread = -(seen.exp() * seen).sum(-1) if entropy else seen[:, 0]
        return logs.gather(1, wanted[:, None]).squeeze(1), spread

    parts = [
        checkpoint(block, rows, weight, wanted, use_reentrant=False)
        for rows, wanted in zip(
            hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True
        )
    ]
    logprobs = torch.cat([part[0] for part in parts])
    return logprobs, torch.cat([part[1] for part in parts]) if entropy else None


@dataclass(frozen=True, slots=True)
class HeadPass:
    """One pass of a frozen head over some rows, with what learning from the very same rows needs of it."""

    hidden: Tensor
    """The rows, shape [n, d]."""
    logprobs: Tensor
    """Of the targets, shape [n]."""
    entropies: Tensor
    """In nats, shape [n]."""
    slopes: Tensor
    """d logprobs / d hidden, shape [n, d]."""

    def again(self, hidden: Tensor) -> Tensor | None:
        """The log-probabilities with their gradient, if `hidden` are the same rows bit by bit; else None.

        Equal rows, head, targets and temperature give equal numbers, so that a pass over the head is saved and
        nothing is taken on trust.
        """
        if hidden.dtype is not self.hidden.dtype or not torch.equal(hidden, self.hidden):
            return None
        found: Tensor = _Known.apply(hidden, self.logprobs, self.slopes)
        return found


@torch.no_grad()  # type: ignore[untyped-decorator]
def head_pass(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> HeadPass:
    """What `linear_logprobs` gives for a frozen head, and the gradient beside it."""
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropies, slopes = _frozen(
            hidden.to(weight.dtype), weight, targets, temperature, entropy=True, gradient=True
        )
    assert slopes is not None
    return HeadPass(hidden, logprobs, entropies, slopes)


class _Known(torch.autograd.Function):  # type: ignore[misc]
    """Numbers that are there already, with their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logprobs: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(slopes)
        ctx.dtype = hidden.dtype
        return logprobs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradients[0][:, None].to(slopes.dtype)).to(ctx.dtype), None, None


class _FrozenHead(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, slopes = _frozen(
            hidden, weight, targets, temperature, entropy=entropy, gradient=ctx.needs_input_grad[0]
        )
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0][:, None].to(slopes.dtype), None, None, None, None


def _frozen(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    *,
    entropy: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tiles over rows and vocabulary with a running maximum, as softmax attention does it.

    Returns:
        log-probabilities [n], entropies [n] (no numbers where they are not wanted), and the gradient [n, d].
    """
    logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    entropies = torch.empty_like(logprobs)
    slopes = torch.empty_like(hidden) if gradient else None
    size = min(ROWS_AT_ONCE, len(hidden)) * min(COLUMNS_AT_ONCE, len(weight))
    # The same memory for every tile stays in a cache; fresh memory doubled the time of a pass.
    room = logprobs.new_empty(2 if entropy else 1, size)
    for first in range(0, len(hidden), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        tiles = _Tiles(
            hidden[rows], targets[rows], temperature, room, entropy=entropy, mean=gradient
        )
        for columns in weight.split(COLUMNS_AT_ONCE):
            tiles.add(columns)
        logprobs[rows] = tiles.logprobs()
        if entropy:
            entropies[rows] = tiles.entropy()
        if slopes is not None:
            chosen = weight[targets[rows]].float()
            slopes[rows] = ((chosen - tiles.mean_row()) / temperature).to(hidden.dtype)
    return logprobs, entropies, slopes


class _Tiles:
    """A softmax over a vocabulary that comes in pieces, for n rows of hidden states [n, d]."""

    def __init__(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        room: Tensor,
        *,
        entropy: bool,
        mean: bool,
    ) -> None:
        self.hidden, self.targets, self.temperature = hidden, targets[:, None], temperature
        self.room = room  # for one tile, or for two where entropies are wanted
        self.seen = 0
        count = len(hidden)
        self.chosen = hidden.new_zeros((count, 1), dtype=torch.float32)
        self.top = hidden.new_full((count, 1), -math.inf, dtype=torch.float32)
        self.mass = torch.zeros_like(self.top)  # sum of exp(z - top)
        self.mean = hidden.new_zeros(hidden.shape, dtype=torch.float32) if mean else None
        # The mean row gives sum p z as well, exactly enough where it is not rounded to fewer bits.
        own = entropy and not (mean and hidden.dtype is torch.float32)
        self.weighted = torch.zeros_like(self.top) if own else None  # and of that times z - top

    def add(self, columns: Tensor) -> None:
        """Take in some rows of the head, shape [c, d]."""
        scores = self._scores(columns)
        # The target's logit is rounded as all others are, else a likely token's probability exceeds 1.
        place = self.targets - self.seen
        here = (place >= 0) & (place < len(columns))
        picked = scores.gather(1, place.clamp(0, len(columns) - 1))
        self.chosen = torch.where(here, picked, self.chosen)
        self.seen += len(columns)
        top = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        scores.sub_(top)
        begun = self.mass > 0
        shift = torch.where(begun, self.top - top, 0.0)
        shrink = torch.where(begun, shift.exp(), 0.0)
        if self.weighted is not None:
            powers = torch.exp(scores, out=self._tile(1, scores.shape))
            new = torch.linalg.vecdot(powers, scores)[:, None]
            self.weighted = shrink * (self.weighted + shift * self.mass) + new
        else:
            powers = scores.exp_()
        self.mass = shrink * self.mass + powers.sum(-1, keepdim=True)
        if self.mean is not None:
            self.mean.mul_(shrink)
            if columns.dtype is torch.float32:
                self.mean.addmm_(powers, columns)
            else:
                self.mean += powers.to(columns.dtype) @ columns
        self.top = top

    def _tile(self, number: int, shape: torch.Size) -> Tensor:
        return self.room[number, : shape.numel()].view(shape)

    def _scores(self, columns: Tensor) -> Tensor:
        scores = self._tile(0, torch.Size((len(self.hidden), len(columns))))
        if columns.dtype is not torch.float32:
            return torch.div((self.hidden @ columns.t()).float(), self.temperature, out=scores)
        return torch.addmm(
            scores, self.hidden, columns.t(), beta=0, alpha=1 / self.temperature, out=scores
        )

    def logprobs(self) -> Tensor:
        """Of the targets, [n]."""
        return (self.chosen - self.top - self.mass.log()).squeeze(1)

    def entropy(self) -> Tensor:
        """In nats, [n]."""
        if self.weighted is not None:
            return (self.mass.log() - self.weighted / self.mass).squeeze(1)
        mean_score = torch.linalg.vecdot(self.hidden, self.mean_row()) / self.temperature
        return (self.mass.log() + self.top).squeeze(1) - mean_score

    def mean_row(self) -> Tensor:
        """The head's rows weighted by their probabilities, [n, d]."""
        assert self.mean is not None
        return self.mean / self.mass
