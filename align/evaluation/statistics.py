"""Intervals of means and shares, and paired comparisons of two models on the same prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import comb, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

RESAMPLES = 10_000
CELLS_AT_ONCE = 4_000_000
"""Random numbers held at once (16 MB); longer lists are resampled in several goes."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that covers the true mean at the stated confidence."""

    mean: float
    low: float
    high: float
    n: int
    method: str
    """`wilson`, `bootstrap` (bias-corrected and accelerated), or `none` for a single value."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over pairs, its interval, and the p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float
    n: int
    test: str
    """`mcnemar` (exact, for 0/1 values) or `sign-flip` (permutation of the signs)."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share: never empty at 0 or 1, and never outside [0, 1]."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} are no share")
    z = _NORMAL.inv_cdf(0.5 + confidence / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the two terms are equal, and rounding must not move the border off 0 or 1.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return low, high


def mean_interval(
    values: ArrayLike, confidence: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Mean with its interval: Wilson's for 0/1 values, else the BCa bootstrap's.

    Args:
        values: one finite number per prompt, shape [n] with n > 0.
        confidence: level of the interval.
        seed: seed of the resampling.
        resamples: bootstrap samples.
    """
    data = _finite(values)
    mean = float(data.mean())
    if np.isin(data, (0.0, 1.0)).all():
        low, high = wilson_interval(int(data.sum()), len(data), confidence)
        return Interval(mean, low, high, len(data), "wilson")
    if len(data) == 1:
        return Interval(mean, mean, mean, 1, "none")
    low, high = _bca(data, confidence, seed, resamples)
    return Interval(mean, low, high, len(data), "bootstrap")


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """How much more `a` has than `b` on the same prompts.

    The interval is the BCa bootstrap's over prompts. The p-value is McNemar's exact one where both
    hold 0 and 1 only, else that of a permutation test which flips the signs of the differences:
    all flips where they are few, else `resamples` random ones (p is then above 1/resamples).

    Args:
        a, b: one finite number per prompt, in the same order, shape [n] with n > 0.
        confidence: level of the interval.
        seed: seed of the resampling.
        resamples: bootstrap samples and random flips.
    """
    first, second = _finite(a), _finite(b)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} values are no pairs")
    difference = first - second
    mean = float(difference.mean())
    low = high = mean
    if np.ptp(difference) > 0:
        low, high = _bca(difference, confidence, seed, resamples)
    binary = np.isin(first, (0.0, 1.0)).all() and np.isin(second, (0.0, 1.0)).all()
    p = _mcnemar(difference) if binary else _sign_flip(difference, seed, resamples)
    test = "mcnemar" if binary else "sign-flip"
    return Difference(mean, low, high, p, len(difference), test)


def _finite(values: ArrayLike) -> Array:
    data = np.asarray(values, dtype=np.float64).reshape(-1)
    if not len(data) or not np.isfinite(data).all():
        raise ValueError("an interval needs at least one value, and finite ones only")
    return data


def _bca(data: Array, confidence: float, seed: int, resamples: int) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987).

    Resampling n values underestimates their variance by n / (n - 1); that is put right here.
    """
    deviations = (data - data.mean()) * sqrt(len(data) / (len(data) - 1))
    spread = float((deviations**2).sum())
    if spread == 0:
        return float(data.mean()), float(data.mean())
    means = np.concatenate(list(_resampled_sums(deviations, seed, resamples))) / len(data)
    # Half of the ties on each side, so that -data has the mirrored interval.
    below = float((means < 0).mean() + (means == 0).mean() / 2)
    bias = _NORMAL.inv_cdf(min(max(below, 1 / resamples), 1 - 1 / resamples))
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5)
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + _NORMAL.inv_cdf(tail)
        ends.append(_NORMAL.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(means, ends) + data.mean()
    return float(low), float(high)


def _resampled_sums(data: Array, seed: int, resamples: int) -> Iterator[Array]:
    """Sums of as many draws from the data, with replacement, as there are data."""
    n = len(data)
    if n * resamples <= CELLS_AT_ONCE:
        yield (_draw_counts(n, seed, resamples) @ data.astype(np.float32)).astype(np.float64)
        return
    rng = np.random.default_rng(seed)
    at_once = max(1, CELLS_AT_ONCE // n)
    for done in range(0, resamples, at_once):
        rows = min(at_once, resamples - done)
        yield data[rng.integers(n, size=(rows, n), dtype=np.int32)].sum(axis=1)


@lru_cache(maxsize=16)
def _draw_counts(n: int, seed: int, resamples: int) -> NDArray[np.float32]:
    """How often each of n values is drawn, shape [resamples, n].

    A report resamples many lists of one length, and these counts serve all of them.
    """
    rng = np.random.default_rng(seed)
    places = rng.integers(n, size=(resamples, n)) + np.arange(resamples)[:, None] * n
    counts = np.bincount(places.ravel(), minlength=resamples * n)
    return counts.reshape(resamples, n).astype(np.float32)


def _mcnemar(difference: Array) -> float:
    """Exact two-sided p-value: which side the disagreements fall on is a fair coin."""
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    disagreements = wins + losses
    tail = sum(comb(disagreements, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / (1 << disagreements))


def _sign_flip(difference: Array, seed: int, resamples: int) -> float:
    moved = np.abs(difference[difference != 0])
    if not len(moved):
        return 1.0
    observed = abs(float(difference.sum()))
    observed -= 1e-5 * float(moved.sum())  # sums in another order differ by rounding
    if 2 ** len(moved) <= resamples:
        bits = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))
        sums = (1.0 - 2.0 * (bits & 1)) @ moved
        return float((np.abs(sums) >= observed).mean())
    reached = 0
    for signs in _flips(len(difference), seed, resamples):
        sums = np.abs(signs @ difference.astype(np.float32))
        reached += int((sums >= observed).sum())
    return (reached + 1) / (resamples + 1)


def _flips(n: int, seed: int, resamples: int) -> Iterator[NDArray[np.float32]]:
    """Random signs, shape [part of the resamples, n]."""
    if n * resamples <= CELLS_AT_ONCE:
        yield _signs(n, seed, resamples)
        return
    rng = np.random.default_rng(seed)
    at_once = max(1, CELLS_AT_ONCE // n)
    for done in range(0, resamples, at_once):
        yield _random_signs(rng, min(at_once, resamples - done), n)


@lru_cache(maxsize=16)
def _signs(n: int, seed: int, resamples: int) -> NDArray[np.float32]:
    return _random_signs(np.random.default_rng(seed), resamples, n)


def _random_signs(rng: np.random.Generator, rows: int, n: int) -> NDArray[np.float32]:
    return (1 - 2 * rng.integers(2, size=(rows, n), dtype=np.int8)).astype(np.float32)


def expected_order(scores: Array, subset: int, rank: int) -> Array:
    """Expected `rank`-th smallest score (from 1) of `subset` samples drawn without return.

    Exact over all subsets, so nothing is drawn: sample i of K in ascending order is the one with
    chance C(i-1, rank-1) C(K-i, subset-rank) / C(K, subset).

    Args:
        scores: shape [prompts, K].

    Returns:
        One number per prompt.
    """
    samples = scores.shape[1]
    chances = [
        comb(below, rank - 1) * comb(samples - 1 - below, subset - rank) / comb(samples, subset)
        for below in range(samples)
    ]
    expected: Array = np.sort(scores, axis=1) @ np.array(chances)
    return expected


def growth_with_samples(scores: Array) -> list[dict[str, float]]:
    """Mean, median and best score against the number of samples N = 1, 2, 4, ..., K.

    Args:
        scores: shape [prompts, K].

    Returns:
        For each N the average over prompts of the expected mean, median and maximum of N samples.
    """
    samples = scores.shape[1]
    sizes = sorted({*(2**power for power in range(samples.bit_length())), samples})
    rows = []
    for size in sizes:
        middle = {(size + 1) // 2, size // 2 + 1}
        median = np.mean([expected_order(scores, size, rank) for rank in middle], axis=0)
        rows.append(
            {
                "n": size,
                "mean": float(scores.mean()),
                "median": float(median.mean()),
                "max": float(expected_order(scores, size, size).mean()),
            }
        )
    return rows


def share(values: Sequence[bool]) -> float:
    """Share of true values, 0 for none at all."""
    return sum(values) / len(values) if values else 0.0
