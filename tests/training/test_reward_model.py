"""The reward model's report on numbers worked by hand."""

import numpy as np
import pytest

from align.training.reward_model import examine


def test_report_by_hand():
    chosen = np.array([2.0, 1.0, 0.0, 3.0])
    rejected = np.array([1.0, 2.0, -1.0, 0.0])
    lengths = np.array([5.0, -5.0, 5.0, -1.0])
    found = examine(chosen, rejected, lengths, np.array([0.1, 0.1, 0.9, 0.9]))
    assert found["accuracy"]["value"] == 0.75
    assert found["accuracy"]["low"] < 0.75 < found["accuracy"]["high"]
    assert [bucket["value"] for bucket in found["by_margin"]] == [0.5, 1.0]
    assert found["length"]["longer_chosen"]["value"] == 1.0
    assert found["length"]["shorter_chosen"]["value"] == 0.5
    # differences 1, -1, 1, 3 against lengths 5, -5, 5, -1: cov 16/4, deviations sqrt(2) and sqrt(18)
    assert found["length"]["correlation"] == pytest.approx(
        np.corrcoef([1, -1, 1, 3], [5, -5, 5, -1])[0, 1]
    )
    # confidence sigmoid(1) = .731 three times (two right) and sigmoid(3) = .953 once (right)
    bins = {bucket["pairs"]: bucket for bucket in found["calibration"]["bins"]}
    assert bins[3]["confidence"] == pytest.approx(0.7310586)
    assert bins[3]["accuracy"] == pytest.approx(2 / 3)
    expected = 0.75 * (0.7310586 - 2 / 3) + 0.25 * (1 - 0.9525741)
    assert found["calibration"]["expected_error"] == pytest.approx(expected, abs=1e-6)


def test_a_constant_reward_has_no_length_correlation_and_is_never_right():
    same = np.zeros(3)
    found = examine(same, same, np.array([1.0, 2.0, 3.0]), None)
    assert found["accuracy"]["value"] == 0.0
    assert found["length"]["correlation"] is None
    assert found["by_margin"] is None
    assert found["length"]["shorter_chosen"]["pairs"] == 0
