"""The arithmetic of PPO as pure functions on padded tensors.

Shapes: E episodes, T completion tokens of the longest one. `mask` is 1 where an episode has a token and 0
behind its end; values behind the end are never read and come out as 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is 1; scalar. Both have the same shape."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Values with variance 1, and mean 0 unless `shift_mean` is off, over all tokens under the mask.

    Args:
        values: shape [E, T], the whole rollout (of every process), so that the result does not depend on
            how it is split.
        mask: shape [E, T].
        shift_mean: `False` keeps the mean (rewards: arXiv 2403.17031, detail 24).
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def kl_estimates(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Per-token estimates of KL(policy || reference) from the drawn tokens.

    Args:
        logprobs, reference: log-probabilities of the drawn tokens, same shape.
        estimator: `k1`: log p - log q, unbiased, of either sign. `k3`: q/p - 1 - log(q/p), unbiased, never
            negative, of less variance (Schulman, "Approximating KL divergence", 2020).

    Returns:
        Estimates in nats, same shape.
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"no KL estimator {estimator!r}")


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of every token: -kl_coef * KL, and the episode's score at its last token.

    Args:
        scores: shape [E]. kl, mask: shape [E, T]. Every episode has at least one token.

    Returns:
        shape [E, T] (arXiv 2203.02155, the sampled form of its eq. 2).
    """
    rewards = -kl_coef * kl * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor
) -> Tensor:
    """Generalized advantage estimates (arXiv 1506.02438, eq. 16); an episode's end is worth 0.

    Args:
        rewards, values, mask: shape [E, T].
        gamma: discount.
        lam: trace decay, one number or one per episode, shape [E].

    Returns:
        Advantages, shape [E, T].
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    trace = torch.zeros_like(rewards[:, 0])
    ahead = torch.zeros_like(trace)
    for step in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, step] + gamma * ahead - values[:, step]
        trace = (delta + gamma * lam * trace) * mask[:, step]
        ahead = values[:, step]
        advantages[:, step] = trace
    return advantages


def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """A decay per episode that grows with its length l: 1 - 1 / (alpha * l) (arXiv 2504.05118, eq. 8).

    Returns:
        shape [E], at least 0.
    """
    return (1 - 1 / (alpha * mask.sum(1))).clamp(min=0.0)


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The policy's loss with what it was made of; sums over tokens, so that parts can be added up."""

    loss: Tensor
    """Sum over the tokens, with a gradient."""
    clipped: Tensor
    """Tokens whose ratio lay outside the clip range on the side that the clip acts on."""
    approx_kl: Tensor
    """Sum of k3 between the policy that drew the tokens and the present one."""
    ratio: Tensor
    """pi_new / pi_old of each token, shape [n], detached."""


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    low: float,
    high: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """The clipped surrogate (arXiv 1707.06347, eq. 7), as a loss, summed over tokens.

    Args:
        logprobs: of the drawn tokens under the present policy, with a gradient, shape [n].
        old: under the policy that drew them, shape [n].
        advantages: shape [n].
        low, high: the ratio is clipped to [1 - low, 1 + high] (`high` above `low`: DAPO, arXiv 2503.14476).
        dual_clip: bound of the loss for negative advantages, in units of them (arXiv 1912.09729), or None.
    """
    difference = logprobs - old
    ratio = difference.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    with torch.no_grad():
        outside = (clipped > plain).sum()
        # The tokens are the old policy's: k3 of KL(old || new), with q/p = new/old.
        approx_kl = (torch.expm1(difference) - difference).sum()
    return PolicyLoss(loss.sum(), outside, approx_kl, ratio.detach())


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error of the values, clipped around the old ones, summed over tokens.

    Args:
        values: shape [n], with a gradient. old: values at the rollout. returns: targets.
        clip: values further than this from the old ones earn no progress; None: no clipping.
    """
    error = (values - returns) ** 2
    if clip is not None:
        near = old + (values - old).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns) ** 2)
    return 0.5 * error.sum()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over tokens; 1 is perfect, 0 as good as a constant."""
    variance = _variance(returns, mask)
    if variance == 0:
        return float("nan")
    return 1 - _variance(returns - values, mask) / variance


def _variance(values: Tensor, mask: Tensor) -> float:
    mean = masked_mean(values, mask)
    return float(masked_mean((values - mean) ** 2, mask))


def adapted_kl_coef(
    kl_coef: float, observed: float, target: float, episodes: int, horizon: int
) -> float:
    """The next KL coefficient of the proportional controller (arXiv 1909.08593, section 2.2).

    Args:
        observed: mean KL of a sequence in this rollout, nats. target: wanted.
        episodes: of this rollout. horizon: episodes over which the coefficient may change by 20 %.
    """
    error = min(max(observed / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
