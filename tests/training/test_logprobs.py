"""Tiled log-probabilities against log_softmax over all the logits."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from align.training import logprobs
from align.training.logprobs import head_pass, linear_logprobs

TILES = list(itertools.product((1, 3, 512), (1, 7, 13, 8192)))


def plain(hidden, weight, targets, temperature=1.0):
    logs = (hidden.float() @ weight.float().t() / temperature).log_softmax(-1)
    return logs.gather(1, targets[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1)


def inputs(rows=11, size=8, vocabulary=39, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, size, generator=generator) * scale
    weight = torch.randn(vocabulary, size, generator=generator)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets


@pytest.fixture(params=TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}")
def tiles(request, monkeypatch):
    monkeypatch.setattr(logprobs, "ROWS_AT_ONCE", request.param[0])
    monkeypatch.setattr(logprobs, "COLUMNS_AT_ONCE", request.param[1])


def gradients(function, hidden, weight, targets, temperature, *, head):
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_(head)
    found, entropy = function(hidden, weight, targets, temperature=temperature)
    (found * torch.arange(1.0, len(found) + 1)).sum().backward()
    return found.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("head", [False, True], ids=["frozen", "trained"])
def test_values_entropies_and_gradients_are_those_of_log_softmax(tiles, temperature, head):
    given = inputs()
    wanted = gradients(plain, *given, temperature, head=head)
    found = gradients(linear_logprobs, *given, temperature, head=head)
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (found[3] is None) == (not head)


def test_large_logits_neither_overflow_nor_vanish(tiles):
    hidden, weight, targets = inputs(scale=300.0)
    found, entropy = linear_logprobs(hidden, weight, targets)
    wanted = plain(hidden.double(), weight.double(), targets)
    assert torch.isfinite(found).all()
    assert torch.isfinite(entropy).all()
    assert_close(found, wanted[0].float(), rtol=1e-4, atol=1e-3)
    assert_close(entropy, wanted[1].float(), rtol=1e-3, atol=1e-3)


def test_bfloat16_is_near(tiles):
    hidden, weight, targets = inputs(rows=40, size=32, dtype=torch.bfloat16)
    found = gradients(linear_logprobs, hidden, weight, targets, 1.0, head=False)
    wanted = gradients(plain, hidden.float(), weight.float(), targets, 1.0, head=False)
    assert found[0].dtype is torch.float32
    assert found[2].dtype is torch.bfloat16
    assert_close(found[0], wanted[0], rtol=0.02, atol=0.15)
    assert (found[2].float() - wanted[2]).norm() < 0.02 * wanted[2].norm()


@pytest.mark.parametrize("head", [False, True])
def test_entropies_have_no_gradient_and_evaluation_keeps_none(head):
    hidden, weight, targets = inputs()
    hidden.requires_grad_()
    weight.requires_grad_(head)
    found, entropy = linear_logprobs(hidden, weight, targets)
    assert found.requires_grad
    assert not entropy.requires_grad
    with torch.no_grad():
        found, _ = linear_logprobs(hidden, weight, targets)
    assert not found.requires_grad


def test_training_and_looking_give_the_very_same_numbers_with_a_frozen_head():
    hidden, weight, targets = inputs(rows=600)
    with torch.no_grad():
        looked = linear_logprobs(hidden, weight, targets)[0]
    learned = linear_logprobs(hidden.requires_grad_(), weight, targets)[0]
    assert torch.equal(looked, learned.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_that_is_kept_gives_the_very_numbers_of_a_new_one(tiles, dtype):
    hidden, weight, targets = inputs(dtype=dtype)
    kept = head_pass(hidden, weight, targets, temperature=0.7)
    wanted = gradients(linear_logprobs, hidden, weight, targets, 0.7, head=False)
    rows = hidden.clone().requires_grad_()
    found = kept.again(rows)
    assert torch.equal(found.detach(), wanted[0])
    (found * torch.arange(1.0, len(found) + 1)).sum().backward()
    assert torch.equal(rows.grad, wanted[2])
    assert_close(kept.entropies, wanted[1], rtol=1e-5, atol=2e-5)


def test_a_pass_over_other_rows_is_not_taken():
    hidden, weight, targets = inputs()
    kept = head_pass(hidden, weight, targets)
    other = hidden.clone()
    other[3, 2] += 1e-6
    assert kept.again(other) is None
    assert kept.again(hidden[:-1]) is None
    assert kept.again(hidden.bfloat16()) is None
    assert kept.again(hidden) is not None


def test_a_gradient_can_be_checked_numerically():
    hidden, weight, targets = inputs(rows=3, size=4, vocabulary=9)
    hidden = hidden.double().requires_grad_()

    def function(rows):
        return linear_logprobs(rows, weight.double(), targets, temperature=0.7)[0]

    # The function computes in float32, so steps are large and the tolerance loose.
    assert torch.autograd.gradcheck(function, (hidden,), eps=1e-2, atol=5e-3, rtol=5e-3)


def test_reduced_precision_rounds_the_target_as_it_rounds_the_others():
    """A likely token's probability stays below 1, and errors are no larger than those of whole logits."""
    torch.manual_seed(0)
    weight = torch.randn(512, 64)
    targets = torch.randint(0, 512, (200,))
    hidden = weight[targets] * 0.3 + torch.randn(200, 64) * 0.1
    exact = (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    whole = (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    found, _ = linear_logprobs(hidden, weight, targets)
    assert float(found.max()) <= 1e-6
    assert float((found - exact).abs().mean()) <= 1.05 * float((whole - exact).abs().mean())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, _ = linear_logprobs(hidden.float(), weight, targets)
    torch.testing.assert_close(again, found)
