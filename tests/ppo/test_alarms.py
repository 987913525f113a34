"""Every alarm rises for its reason alone, and only after so many rollouts."""

import pytest

from align.ppo.alarms import alarms
from align.stages.ppo import AlarmSection

CALM = {
    "length": 20.0,
    "reward": 0.0,
    "kl": 1.0,
    "kl_per_token": 0.05,
    "eos_rate": 1.0,
    "explained_variance": 0.5,
    "clipped_scores": 0.0,
    "score_deviation": 1.0,
    "unique_rate": 1.0,
}
WRONG = {
    "length": {"length": 40.0, "reward": 1.0},
    "kl": {"kl_per_token": 0.3},
    "eos": {"eos_rate": 0.7},
    "critic": {"explained_variance": -0.1},
    "saturation": {"clipped_scores": 0.6},
    "collapse": {"unique_rate": 0.3},
}


def raised(history, **limits):
    return [alarm.name for alarm in alarms(history, AlarmSection(**limits))]


@pytest.mark.parametrize("name", WRONG)
def test_each_alarm_wants_its_reason_for_as_long_as_patience_asks(name):
    calm, wrong = [CALM] * 6, [CALM | WRONG[name]]
    assert raised(calm) == []
    assert raised(calm + 2 * wrong) == []
    assert raised(calm + 3 * wrong) == [name]
    assert raised(calm + 3 * wrong + [CALM]) == []
    assert raised(calm + wrong, patience=1) == [name]


def test_an_alarm_says_why_and_what_to_do():
    for name, wrong in WRONG.items():
        (alarm,) = alarms([CALM] * 6 + 3 * [CALM | wrong], AlarmSection())
        assert alarm.name == name
        assert len(alarm.reason) > 20
        assert len(alarm.remedy) > 20


def test_longer_answers_without_a_higher_reward_are_no_alarm():
    assert raised([CALM] * 6 + 3 * [CALM | {"length": 90.0, "reward": -1.0}]) == []


def test_a_policy_that_never_ends_its_turn_is_told_at_once():
    assert raised([CALM | {"eos_rate": 0.0}] * 3) == ["eos"]


def test_the_critic_has_time_to_learn():
    wrong = CALM | WRONG["critic"]
    assert raised([wrong] * 5) == []
    assert raised([wrong] * 6) == ["critic"]
    assert raised([wrong] * 5, critic_grace=0) == ["critic"]
    assert raised([CALM | {"explained_variance": float("nan")}] * 9) == []


def test_scores_without_spread_are_saturated():
    assert raised([CALM] * 3 + 3 * [CALM | {"score_deviation": 0.01}]) == ["saturation"]


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"length_growth": 3.0}, "length"),
        ({"kl_per_token": 0.5}, "kl"),
        ({"eos_drop": 0.5}, "eos"),
        ({"saturated_share": 0.9}, "saturation"),
        ({"unique_share": 0.1}, "collapse"),
    ],
)
def test_limits_are_the_recipe_s(limits, name):
    history = [CALM] * 6 + 3 * [CALM | WRONG[name]]
    assert raised(history) == [name]
    assert raised(history, **limits) == []
