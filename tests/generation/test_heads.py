"""The decoding head: a linear layer's own numbers, only where it helps, and only while decoding."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from align.generation import heads
from align.generation.heads import DecodingHead, decoding_head


class Model:
    def __init__(self, head):
        self.head = head

    def get_output_embeddings(self):
        return self.head


def make(size=16, vocabulary=5000, **more) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(size, vocabulary, bias=False, **more)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 16, 17, 40])
def test_its_numbers_are_the_linear_layer_s(rows):
    head = make()
    x = torch.randn(rows, 1, 16)
    wanted = head(x)
    head.__class__ = DecodingHead
    with torch.inference_mode():
        found = head(x)
    assert found.shape == (rows, 1, 5000)
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert head(x[:0]).shape == (0, 1, 5000)


@pytest.mark.parametrize("change", ["bias", "bfloat16", "autocast"])
def test_anything_else_is_left_to_torch(change):
    head = make()
    if change == "bias":
        head.bias = nn.Parameter(torch.randn(5000))
    head = head.bfloat16() if change == "bfloat16" else head
    x = torch.randn(3, 16, dtype=head.weight.dtype)
    with torch.inference_mode(), torch.autocast("cpu", enabled=change == "autocast"):
        wanted = head(x)
        head.__class__ = DecodingHead
        assert torch.equal(head(x), wanted)


def test_only_large_plain_heads_get_it_and_give_it_back(monkeypatch):
    monkeypatch.setattr(heads, "LARGE", 80_000)
    head = make()
    with torch.inference_mode(), decoding_head(Model(head)):
        assert type(head) is DecodingHead
    assert type(head) is nn.Linear
    for other in (make(vocabulary=4999), make(dtype=torch.bfloat16)):
        with torch.inference_mode(), decoding_head(Model(other)):
            assert type(other) is nn.Linear
    with decoding_head(Model(head)):  # with gradients nothing may be written in place
        assert type(head) is nn.Linear
    with torch.inference_mode(), decoding_head(Model(None)):
        pass
