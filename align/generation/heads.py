"""The output head of a large vocabulary on few rows, as decoding needs it on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 1 << 24
"""Weights of a head that no cache holds (64 MiB in float32)."""
FEW_ROWS = 8
COLUMNS_AT_ONCE = 2048
"""A tile of the head, whose transposed product fits into a cache."""


class DecodingHead(nn.Linear):  # type: ignore[misc]
    """A linear layer that reads its weights at the memory's full speed for up to 8 rows in float32.

    W x^T instead of x W^T: BLAS computes the latter at half that speed where there are so few rows. A class and no
    replaced method, so that `decoding_head` can take it away again.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear's, [..., in] -> [..., out]."""
        rows = input.reshape(-1, input.shape[-1])
        plain = self.bias is None and rows.dtype is self.weight.dtype is torch.float32
        if not plain or not 0 < len(rows) <= FEW_ROWS or torch.is_autocast_enabled("cpu"):
            slow: Tensor = super().forward(input)
            return slow
        # One vector is multiplied slower than two.
        columns = (rows.repeat(2, 1) if len(rows) == 1 else rows).t()
        found = rows.new_empty(len(rows), len(self.weight))
        for first in range(0, len(self.weight), COLUMNS_AT_ONCE):
            tile = self.weight[first : first + COLUMNS_AT_ONCE]
            found[:, first : first + len(tile)] = (tile @ columns).t()[: len(rows)]
        return found.view(*input.shape[:-1], -1)


@contextmanager
def decoding_head(model: Any) -> Iterator[None]:
    """Give the model's output head the quick product while it decodes, where that is known to help."""
    head = model.get_output_embeddings()
    wanted = (
        type(head) is nn.Linear
        and head.weight.device.type == "cpu"
        and head.weight.dtype is torch.float32
        and head.weight.numel() >= LARGE
        and torch.is_inference_mode_enabled()
    )
    if wanted:
        head.__class__ = DecodingHead
    try:
        yield
    finally:
        if wanted:
            head.__class__ = nn.Linear
