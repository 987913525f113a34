"""Intervals cover what they promise, tests have their size, and both are symmetric."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.evaluation.statistics import (
    expected_order,
    growth_with_samples,
    mean_interval,
    paired_difference,
    wilson_interval,
)

finite = st.floats(-100, 100).map(lambda value: round(value, 3))


def test_wilson_interval_against_published_values():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_is_symmetric(pair):
    successes, n = pair
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert high - low > 0
    mirrored = wilson_interval(n - successes, n)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)
    wider = wilson_interval(successes, n, 0.99)
    assert wider[0] <= low
    assert wider[1] >= high


@pytest.mark.parametrize("pair", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_what_is_no_share(pair):
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(*pair)


def coverage(draw, true_mean: float, simulations: int, **options) -> float:
    rng = np.random.default_rng(0)
    inside = 0
    for at in range(simulations):
        found = mean_interval(draw(rng), seed=at % 8, resamples=1000, **options)
        inside += found.low <= true_mean <= found.high
    return inside / simulations


# Four deviations of the share of 1,000 simulations are 2.8 points; the bootstrap of 80 skewed
# values itself lacks about one point.
@pytest.mark.parametrize(
    ("draw", "true_mean"),
    [
        (lambda rng: rng.normal(3, 2, 100), 3.0),
        (lambda rng: rng.choice([0.1, 0.4, 0.8, 1.0], 100, p=[0.3, 0.2, 0.2, 0.3]), 0.57),
        (lambda rng: rng.exponential(1, 150), 1.0),
        (lambda rng: (rng.random(100) < 0.3).astype(float), 0.3),
    ],
)
def test_intervals_cover_the_true_mean(draw, true_mean):
    assert 0.925 <= coverage(draw, true_mean, 1000) <= 0.975


def test_the_level_of_confidence_is_heeded():
    def draw(rng):
        return rng.normal(0, 1, 60)

    assert 0.74 <= coverage(draw, 0.0, 500, confidence=0.8) <= 0.86


def test_binary_values_get_wilson_and_others_the_bootstrap():
    assert mean_interval([0, 1, 1, 0]).method == "wilson"
    assert mean_interval([1.0] * 30).low == pytest.approx(wilson_interval(30, 30)[0])
    assert mean_interval([0.5, 0.2, 0.9]).method == "bootstrap"
    constant = mean_interval([0.5] * 20)
    assert (constant.low, constant.high) == (0.5, 0.5)
    single = mean_interval([0.7])
    assert (single.mean, single.low, single.high, single.method) == (0.7, 0.7, 0.7, "none")


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf]])
def test_intervals_want_finite_values(values):
    with pytest.raises(ValueError, match="at least one value, and finite"):
        mean_interval(values)


@settings(max_examples=25, deadline=None)
@given(st.lists(finite, min_size=2, max_size=30), st.floats(-50, 50))
def test_intervals_hold_the_mean_move_with_the_values_and_mirror(values, shift):
    found = mean_interval(values, resamples=500)
    if found.method != "bootstrap":
        return
    slack = 1e-6
    assert found.low - slack <= found.mean <= found.high + slack
    assert found == mean_interval(values, resamples=500)
    mirrored = mean_interval([-value for value in values], resamples=500)
    if mirrored.method == "bootstrap":
        assert mirrored.low == pytest.approx(-found.high, abs=slack)
        assert mirrored.high == pytest.approx(-found.low, abs=slack)


def test_the_same_seed_gives_the_same_interval_and_more_values_a_narrower_one():
    rng = np.random.default_rng(1)
    values = rng.random(400)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)
    few, many = mean_interval(values[:50]), mean_interval(values)
    assert many.high - many.low < few.high - few.low


def test_no_difference_has_p_one():
    values = [0.1, 0.5, 0.9]
    assert paired_difference(values, values).p == 1
    assert paired_difference([0, 1, 1], [0, 1, 1]).p == 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=30))
def test_paired_differences_are_antisymmetric(pairs):
    a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found, back = (paired_difference(x, y, resamples=500) for x, y in ((a, b), (b, a)))
    assert found.mean == -back.mean
    assert found.low == pytest.approx(-back.high, abs=1e-6)
    assert found.p == back.p
    assert 0 < found.p <= 1


def test_the_sign_flip_test_is_exact_for_few_pairs():
    # All of five differences positive: 2 of 32 flips are as far from zero.
    found = paired_difference([1.5, 2, 3, 4, 5], [1, 1, 1, 1, 1])
    assert found.p == pytest.approx(2 / 32)
    assert found.test == "sign-flip"


def test_mcnemar_is_exact():
    # 9 against 1 of ten disagreements: 2 (1 + 10) / 1024.
    a, b = [1] * 9 + [0] + [1] * 5, [0] * 9 + [1] + [1] * 5
    found = paired_difference(a, b)
    assert found.p == pytest.approx(2 * 11 / 1024)
    assert found.test == "mcnemar"
    assert found.low > 0


def test_tests_reject_a_true_null_as_often_as_they_say():
    rng = np.random.default_rng(0)
    rejected = 0
    for at in range(600):
        a, b = rng.random((2, 40))
        rejected += paired_difference(a, b, seed=at, resamples=400).p < 0.05
    assert 0.02 <= rejected / 600 <= 0.085


def test_pairing_sees_what_independent_intervals_hide():
    rng = np.random.default_rng(0)
    base = rng.random(100)
    better = base + 0.03 + rng.normal(0, 0.03, 100)
    found = paired_difference(better, base)
    assert found.p < 0.001
    assert found.low > 0
    assert mean_interval(better).low < mean_interval(base).high


def test_pairs_want_equal_lengths():
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference([0.1, 0.2], [0.1])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 7).flatmap(
        lambda k: st.tuples(
            st.lists(st.lists(finite, min_size=k, max_size=k), min_size=1, max_size=3),
            st.integers(1, k),
        )
    )
)
def test_expected_order_equals_the_average_over_all_subsets(drawn):
    from itertools import combinations

    rows, size = drawn
    scores = np.array(rows)
    for rank in range(1, size + 1):
        expected = [
            np.mean([sorted(subset)[rank - 1] for subset in combinations(row, size)])
            for row in rows
        ]
        np.testing.assert_allclose(expected_order(scores, size, rank), expected, atol=1e-9)


def test_growth_with_samples():
    rows = growth_with_samples(np.array([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]]))
    assert [row["n"] for row in rows] == [1, 2, 3]
    assert [row["mean"] for row in rows] == pytest.approx([0.75] * 3)
    assert [row["max"] for row in rows] == pytest.approx([0.75, (5 / 6 + 1) / 2, 1.0])
    assert [row["median"] for row in rows] == pytest.approx([0.75] * 3)
    assert [row["n"] for row in growth_with_samples(np.ones((2, 16)))] == [1, 2, 4, 8, 16]
