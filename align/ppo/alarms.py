"""Alarms: what goes wrong in reinforcement learning from a learned reward, said while it happens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Summary = Mapping[str, float]
"""One rollout in numbers, see `align.ppo.rollout.summary`."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that is probably wrong, and the way out."""

    name: str
    reason: str
    remedy: str


def alarms(history: Sequence[Summary], limits: Any) -> list[Alarm]:
    """The alarms that the last rollouts give.

    A condition has to hold for `limits.patience` rollouts in a row, so that one odd rollout is none.

    Args:
        history: summaries of all rollouts so far, the first one drawn from the untrained policy.
        limits: the `alarms` section of the recipe.
    """
    if len(history) < limits.patience:
        return []
    recent, first = history[-limits.patience :], history[0]
    checks = (_length, _kl, _endings, _critic, _saturation, _collapse)
    found = [check(first, recent, limits, len(history)) for check in checks]
    return [alarm for alarm in found if alarm is not None]


def _length(first: Summary, recent: Sequence[Summary], limits: Any, _: int) -> Alarm | None:
    grown = all(one["length"] > limits.length_growth * first["length"] for one in recent)
    better = recent[-1]["reward"] > first["reward"]
    if not (grown and better):
        return None
    return Alarm(
        "length",
        f"answers grew from {first['length']:.0f} to {recent[-1]['length']:.0f} tokens while the reward rose: "
        "the policy may be paid for length",
        "look at the samples; check `length` in reward_report.json of the reward model, raise kl_coef, or lower "
        "generation.max_new_tokens",
    )


def _kl(_: Summary, recent: Sequence[Summary], limits: Any, __: int) -> Alarm | None:
    if not all(one["kl_per_token"] > limits.kl_per_token for one in recent):
        return None
    last = recent[-1]
    return Alarm(
        "kl",
        f"the policy is {last['kl']:.1f} nats per answer ({last['kl_per_token']:.3f} per token) away from the "
        "reference, where a reward model has seen no texts: a higher reward means little there",
        "raise kl_coef, set kl_target, lower the learning rate, or stop earlier",
    )


def _endings(first: Summary, recent: Sequence[Summary], limits: Any, _: int) -> Alarm | None:
    if all(one["eos_rate"] == 0 for one in recent):
        return Alarm(
            "eos",
            "no answer ends its turn",
            "start from a model that was fine-tuned to end its turns (`align sft`), or raise "
            "generation.max_new_tokens",
        )
    if not all(one["eos_rate"] < first["eos_rate"] - limits.eos_drop for one in recent):
        return None
    return Alarm(
        "eos",
        f"only {recent[-1]['eos_rate']:.0%} of the answers end their turn, {first['eos_rate']:.0%} did at first",
        "set missing_eos_penalty, raise kl_coef, or raise generation.max_new_tokens",
    )


def _critic(_: Summary, recent: Sequence[Summary], limits: Any, rollouts: int) -> Alarm | None:
    if rollouts <= limits.critic_grace:
        return None
    values = [one["explained_variance"] for one in recent]
    if any(math.isnan(value) or value >= 0 for value in values):
        return None
    return Alarm(
        "critic",
        f"the values explain nothing of the returns (explained variance {values[-1]:.2f}): advantages are noise",
        "raise value_learning_rate or critic_warmup_steps, or start the value from the reward model "
        "(value_init: reward)",
    )


def _saturation(first: Summary, recent: Sequence[Summary], limits: Any, _: int) -> Alarm | None:
    clipped = all(one["clipped_scores"] > limits.saturated_share for one in recent)
    flat = all(one["score_deviation"] < 0.1 * first["score_deviation"] for one in recent)
    if not (clipped or flat):
        return None
    what = (
        f"{recent[-1]['clipped_scores']:.0%} of the scores lie at the clip"
        if clipped
        else "all answers get nearly the same score"
    )
    return Alarm(
        "saturation",
        f"{what}: the reward no longer tells answers apart",
        "stop here, raise kl_coef, raise reward_clip, or train the reward model on samples of this policy",
    )


def _collapse(first: Summary, recent: Sequence[Summary], limits: Any, _: int) -> Alarm | None:
    low = limits.unique_share * first["unique_rate"]
    if not all(one["unique_rate"] < low for one in recent):
        return None
    return Alarm(
        "collapse",
        f"only {recent[-1]['unique_rate']:.0%} of the answers differ from each other, "
        f"{first['unique_rate']:.0%} did at first",
        "raise kl_coef or lower the learning rate; look at the samples for one answer to every prompt",
    )
