"""Random tokens that belong to a place and not to a moment.

The number that decides a token depends on the seed, the prompt, the sample and the step alone, so
the text of a sample is the same in any batch, after any interruption and on any number of
processes, up to ties of floating-point numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from align.errors import fail

BLOCK = 256
"""Tokens whose probabilities are added up first: only one block's running sum is needed."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the next token is chosen, and when a completion is over."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken every time."""
        return self.temperature == 0


def uniforms(seed: int, places: Sequence[tuple[int, int]], steps: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) for each (prompt, sample), shape [len(places), steps], float64.

    Philox is counter-based: seed and prompt are its key and the sample the high word of its
    counter, so every row is a stream of its own that costs nothing to reach.
    """
    rows = np.empty((len(places), steps))
    for row, (prompt, sample) in zip(rows, places, strict=True):
        stream = np.random.Philox(
            key=np.array([seed, prompt], np.uint64), counter=[0, 0, 0, sample]
        )
        row[:] = np.random.Generator(stream).random(steps)
    return torch.from_numpy(rows)


def choose(logits: torch.Tensor, uniform: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """The next token of each row.

    Args:
        logits: scores of the vocabulary, shape [rows, vocabulary].
        uniform: one number in [0, 1) for each row, shape [rows], float64.
        decoding: temperature, top-k and top-p, applied in this order.

    Returns:
        Token ids, shape [rows]: the most likely ones at temperature 0, else the first token at
        which the cumulative probability exceeds the row's number. Where drawn from logits that
        are NaN, the size of the vocabulary: see `refuse_nan`.
    """
    if decoding.greedy:
        return logits.argmax(-1)
    scores = logits.float() / decoding.temperature
    if 0 < decoding.top_k < scores.shape[-1]:
        least = scores.topk(decoding.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if decoding.top_p < 1:
        scores = _nucleus(scores, decoding.top_p)
    return _at(scores.softmax(-1), uniform)


def _at(probability: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first place of each row at which the cumulative probability exceeds its number.

    Args:
        probability: shape [rows, vocabulary]. uniform: shape [rows], float64.
    """
    rows, size = probability.shape
    padded = functional.pad(probability, (0, -size % BLOCK)) if size % BLOCK else probability
    blocks = padded.view(rows, -1, BLOCK)
    # float32 sums over 128,000 tokens would shift the borders by more than rare tokens are wide.
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    # A float64 below 1 times the total is below the total, so the token has some probability.
    target = uniform * ends[:, -1]
    block = torch.searchsorted(ends, target[:, None], right=True).squeeze(1)
    drawn = block < blocks.shape[1]  # not so where the probabilities are NaN
    block = block.clamp(max=blocks.shape[1] - 1)
    every = torch.arange(rows, device=probability.device)
    before = torch.where(block > 0, ends[every, (block - 1).clamp(min=0)], 0.0)
    mass = before[:, None] + blocks[every, block].double().cumsum(-1)
    inside = torch.searchsorted(mass, target[:, None], right=True).squeeze(1)
    # Two orders of summing differ in the last bits: a number on a block's border stays inside it.
    last = (blocks[every, block] > 0).long().cumsum(-1).argmax(-1)
    return torch.where(drawn, block * BLOCK + torch.minimum(inside, last), size)


def refuse_nan(tokens: torch.Tensor, vocabulary: int) -> None:
    """Refuse tokens that were drawn from logits that are no numbers."""
    if bool((tokens >= vocabulary).any()):
        fail(
            "the model's logits are no numbers (NaN), so no token can be drawn",
            hint="check the model; float16 overflows where bfloat16 and float32 do not",
        )


def _nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask all but the smallest set of most likely tokens whose probabilities reach `top_p`."""
    ordered, order = scores.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    outside = probability.cumsum(-1) - probability >= top_p
    outside[:, 0] = False
    return scores.masked_fill(outside.scatter(1, order, outside), -torch.inf)
