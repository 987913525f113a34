"""Gradients of all processes: added up in place, in float32, never all of them copied at once."""

import pytest
import torch
from torch.testing import assert_close

from align.ppo import gradients


@pytest.fixture
def sent(monkeypatch):
    """What travels; the other process has the same numbers plus one."""
    found = []

    def all_reduce(tensor):
        assert tensor.dtype is torch.float32
        found.append(tensor.numel())
        tensor.add_(tensor + 1)

    monkeypatch.setattr(gradients.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(gradients, "BUCKET", 10)
    return found


def test_every_gradient_becomes_the_sum_and_buckets_stay_small(sent):
    torch.manual_seed(0)
    shapes = [(2, 3), (4,), (25,), (3,), (2, 2), (5, 1), (0,)]
    own = [torch.randn(shape) for shape in shapes]
    own[4] = own[4].t()  # not contiguous
    given = [one.clone(memory_format=torch.preserve_format) for one in own]
    gradients.sum_over_processes(given)
    for found, one in zip(given, own, strict=True):
        assert_close(found, 2 * one + 1)
    assert sent == [10, 25, 7, 5]


def test_reduced_precision_is_added_in_float32(sent):
    own = [torch.tensor([1.0, 256.0], dtype=torch.bfloat16), torch.ones(2)]
    gradients.sum_over_processes(own)
    assert own[0].dtype is torch.bfloat16
    assert own[0].tolist() == [3.0, 512.0]  # 513, rounded once
    assert own[1].tolist() == [3.0, 3.0]


def test_without_gradients_nothing_travels(sent):
    gradients.sum_over_processes([])
    assert not sent
