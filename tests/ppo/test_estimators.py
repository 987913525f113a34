"""PPO's arithmetic against numbers worked out by hand, and against its own laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from align.ppo import estimators as e

T = torch.tensor


# --- means, whitening ------------------------------------------------------------------------


def test_masked_mean_reads_only_what_the_mask_shows():
    values, mask = T([[1.0, 2.0, 100.0], [3.0, 100.0, 100.0]]), T([[1.0, 1, 0], [1, 0, 0]])
    assert e.masked_mean(values, mask) == 2.0


def test_whitening_by_hand():
    # 1, 3 and 5 under the mask: mean 3, variance 8/3.
    values, mask = T([[1.0, 3.0], [5.0, 77.0]]), T([[1.0, 1], [1, 0]])
    unit = math.sqrt(8 / 3)
    assert_close(e.whiten(values, mask), T([[-2 / unit, 0.0], [2 / unit, 0.0]]))
    kept = e.whiten(values, mask, shift_mean=False)
    assert_close(kept, T([[3 - 2 / unit, 3.0], [3 + 2 / unit, 0.0]]))


def test_whitening_of_equal_values_is_finite():
    assert_close(e.whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)), torch.zeros(2, 3))


def test_whitening_is_that_of_all_tokens_and_not_of_each_process():
    """The rollouts of two processes, whitened together, are not what each would whiten alone."""
    first, second = torch.randn(2, 4), torch.randn(2, 4) + 5
    whole = e.whiten(torch.cat([first, second]), torch.ones(4, 4))
    assert float(whole.mean()) == pytest.approx(0, abs=1e-6)
    assert float(whole.var(correction=0)) == pytest.approx(1, abs=1e-5)
    assert (whole[:2] - e.whiten(first, torch.ones(2, 4))).abs().max() > 0.5


# --- KL and rewards --------------------------------------------------------------------------


def test_kl_estimates_by_hand():
    policy, reference = T([[-1.0, -2.0]]), T([[-1.5, -1.0]])
    assert_close(e.kl_estimates(policy, reference, "k1"), T([[0.5, -1.0]]))
    k3 = T([[math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]])
    assert_close(e.kl_estimates(policy, reference, "k3"), k3)
    with pytest.raises(ValueError, match="k2"):
        e.kl_estimates(policy, reference, "k2")


def test_both_estimators_have_the_kl_as_their_mean():
    torch.manual_seed(0)
    p, q = torch.randn(50).log_softmax(0), torch.randn(50).log_softmax(0)
    kl = float((p.exp() * (p - q)).sum())
    for name in ("k1", "k3"):
        assert float((p.exp() * e.kl_estimates(p, q, name)).sum()) == pytest.approx(kl, abs=1e-5)


def test_the_score_is_paid_at_the_last_token_and_the_kl_at_every_one():
    kl, mask = T([[0.1, 0.2, 0.3], [0.5, 9.0, 9.0]]), T([[1.0, 1, 1], [1, 0, 0]])
    found = e.token_rewards(T([2.0, -1.0]), kl, mask, kl_coef=0.5)
    assert_close(found, T([[-0.05, -0.1, 1.85], [-1.25, 0.0, 0.0]]))


# --- advantages ------------------------------------------------------------------------------


def test_gae_by_hand_for_two_episodes_of_different_length():
    rewards = T([[1.0, 0.0, 2.0], [3.0, 99.0, 99.0]])
    values = T([[0.5, 1.0, 1.5], [2.0, 99.0, 99.0]])
    mask = T([[1.0, 1, 1], [1, 0, 0]])
    # gamma .9, lambda .5, from the end: d2 = 2 - 1.5 = .5; d1 = 0 + .9*1.5 - 1 = .35,
    # A1 = .35 + .45*.5 = .575; d0 = 1 + .9*1 - .5 = 1.4, A0 = 1.4 + .45*.575 = 1.65875.
    found = e.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    assert_close(found, T([[1.65875, 0.575, 0.5], [1.0, 0.0, 0.0]]))


def test_every_episode_may_have_a_lambda_of_its_own():
    rewards, values, mask = torch.randn(2, 5), torch.randn(2, 5), torch.ones(2, 5)
    both = e.gae(rewards, values, mask, gamma=0.9, lam=T([0.3, 0.8]))
    for row, lam in enumerate((0.3, 0.8)):
        alone = e.gae(rewards, values, mask, gamma=0.9, lam=lam)
        assert_close(both[row], alone[row])


def test_length_adaptive_lambda_by_hand():
    mask = T([[1.0] * 10, [1.0] * 2 + [0.0] * 8, [1.0] + [0.0] * 9])
    # alpha .5: 1 - 1/5, 1 - 1/1, 1 - 1/.5 < 0
    assert_close(e.length_adaptive_lambda(mask, 0.5), T([0.8, 0.0, 0.0]))


@st.composite
def rollouts(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    mask = (torch.arange(max(lengths)) < T(lengths)[:, None]).double()
    shape = tuple(mask.shape)
    rewards, values = (torch.randn(shape, generator=generator, dtype=torch.double) for _ in "ab")
    return rewards, values, mask


@settings(max_examples=60, deadline=None)
@given(rollouts())
def test_with_gamma_and_lambda_1_an_advantage_is_return_minus_value(rollout):
    rewards, values, mask = rollout
    found = e.gae(rewards * mask, values, mask, gamma=1.0, lam=1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    assert_close(found, (to_go - values) * mask)


@settings(max_examples=60, deadline=None)
@given(rollouts())
def test_with_lambda_0_an_advantage_is_the_error_of_one_step(rollout):
    rewards, values, mask = rollout
    found = e.gae(rewards * mask, values, mask, gamma=0.7, lam=0.0)
    ahead = torch.cat([(values * mask)[:, 1:], torch.zeros_like(values[:, :1])], 1)
    assert_close(found, (rewards + 0.7 * ahead - values) * mask)


@settings(max_examples=60, deadline=None)
@given(rollouts(), st.integers(1, 4), st.floats(-1e3, 1e3))
def test_padding_changes_nothing(rollout, more, junk):
    rewards, values, mask = rollout

    def padded(values, fill):
        return torch.cat([values, values.new_full((len(values), more), fill)], 1)

    def dirty(values):  # also what stands behind the shorter episodes' ends
        return torch.where(mask > 0, values, torch.full_like(values, junk))

    wide = padded(mask, 0.0)
    options = {"gamma": 0.9, "lam": 0.8}
    plain = e.gae(rewards * mask, values * mask, mask, **options)
    found = e.gae(padded(rewards * mask, 0.0), padded(dirty(values), junk), wide, **options)
    assert_close(found, padded(plain, 0.0))
    assert_close(e.whiten(padded(dirty(values), junk), wide), padded(e.whiten(values, mask), 0.0))
    scores = rewards[:, 0]
    assert_close(
        e.token_rewards(scores, padded(dirty(values), junk), wide, 0.1),
        padded(e.token_rewards(scores, values, mask, 0.1), 0.0),
    )
    if mask.sum() > 1:
        one = e.explained_variance(values, rewards, mask)
        other = e.explained_variance(padded(dirty(values), junk), padded(rewards, junk), wide)
        assert other == pytest.approx(one, rel=1e-6)


# --- losses ----------------------------------------------------------------------------------


def surrogate(ratios, advantages, **options):
    """Loss, gradient by log-probability and what was counted."""
    options = {"low": 0.2, "high": 0.2} | options
    logprobs = T(ratios).log().requires_grad_()
    part = e.policy_loss(logprobs, torch.zeros(len(ratios)), T(advantages), **options)
    part.loss.backward()
    return float(part.loss.detach()), logprobs.grad, part


def test_the_clipped_surrogate_by_hand():
    # The ratio is held at 1.2 for good tokens and at 0.8 for bad ones; the other way it is free.
    loss, gradient, part = surrogate([1.0, 1.5, 0.5, 1.5, 0.5], [1.0, 1.0, -1.0, -1.0, 1.0])
    assert loss == pytest.approx(-1.0 - 1.2 + 0.8 + 1.5 - 0.5)
    assert_close(gradient, T([-1.0, 0.0, 0.0, 1.5, -0.5]))
    assert int(part.clipped) == 2
    assert_close(part.ratio, T([1.0, 1.5, 0.5, 1.5, 0.5]))
    assert not part.ratio.requires_grad


def test_clip_higher_leaves_good_tokens_more_room():
    loss, gradient, part = surrogate([1.25, 1.5], [1.0, 1.0], high=0.28)
    assert loss == pytest.approx(-1.25 - 1.28)
    assert_close(gradient, T([-1.25, 0.0]))
    assert int(part.clipped) == 1
    loss, gradient, _ = surrogate([0.75], [-1.0], high=0.28)
    assert loss == pytest.approx(0.8)
    assert_close(gradient, T([0.0]))


def test_dual_clip_bounds_what_a_bad_token_costs():
    loss, gradient, _ = surrogate([5.0, 2.0, 5.0], [-1.0, -1.0, 1.0], dual_clip=3.0)
    assert loss == pytest.approx(3.0 + 2.0 - 1.2)
    assert_close(gradient, T([0.0, 2.0, 0.0]))


def test_approximate_kl_is_that_from_the_old_policy():
    _, _, part = surrogate([2.0, 0.5], [1.0, 1.0])
    assert float(part.approx_kl) == pytest.approx(2 - 1 - math.log(2) + 0.5 - 1 + math.log(2))
    torch.manual_seed(0)
    old, new = torch.randn(50).log_softmax(0), torch.randn(50).log_softmax(0)
    draws = old.exp().multinomial(200_000, replacement=True)
    part = e.policy_loss(new[draws], old[draws], torch.zeros(len(draws)), low=0.2, high=0.2)
    kl = float((old.exp() * (old - new)).sum())
    assert float(part.approx_kl) / len(draws) == pytest.approx(kl, rel=0.02)


def test_the_clipped_value_loss_by_hand():
    values = T([1.0, 3.0, 0.9]).requires_grad_()
    old, returns = T([1.0, 1.0, 1.0]), T([2.0, 2.0, 2.0])
    loss = e.value_loss(values, old, returns, clip=0.2)
    # 3.0 is as far from 2 as 1.0, but held at 1.2 it is .8 away: the larger error counts.
    assert float(loss.detach()) == pytest.approx(0.5 * (1.0 + 1.0 + 1.21))
    loss.backward()
    assert_close(values.grad, T([-1.0, 1.0, -1.1]))
    values = T([1.9]).requires_grad_()  # nearer than the clip allows: no further progress
    loss = e.value_loss(values, T([1.0]), T([2.0]), clip=0.2)
    assert float(loss.detach()) == pytest.approx(0.5 * 0.64)
    loss.backward()
    assert_close(values.grad, T([0.0]))
    assert float(e.value_loss(T([1.9]), T([1.0]), T([2.0]), clip=None)) == pytest.approx(0.005)


# --- what is logged and controlled -----------------------------------------------------------


def test_explained_variance_by_hand():
    returns, mask = T([[1.0, 2.0], [3.0, 50.0]]), T([[1.0, 1], [1, 0]])
    assert e.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert e.explained_variance(torch.full((2, 2), 7.0), returns, mask) == pytest.approx(0.0)
    assert e.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert math.isnan(e.explained_variance(returns, torch.ones(2, 2), mask))


def test_the_kl_controller_by_hand():
    # Twice the target is cut to an error of 20 %; half a rollout's horizon halves the change.
    assert e.adapted_kl_coef(0.1, 12.0, 6.0, episodes=100, horizon=1000) == pytest.approx(0.102)
    assert e.adapted_kl_coef(0.1, 6.6, 6.0, episodes=100, horizon=1000) == pytest.approx(0.101)
    assert e.adapted_kl_coef(0.1, 0.0, 6.0, episodes=500, horizon=1000) == pytest.approx(0.09)
    assert e.adapted_kl_coef(0.1, 6.0, 6.0, episodes=500, horizon=1000) == 0.1
