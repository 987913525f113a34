"""Which planner plans which kind of stage. A new kind is a function and a line in `PLANNERS`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from align.config.sections import StageConfig
from align.errors import AlignError
from align.plan.averaged import plan_average
from align.plan.drawn import plan_evaluation, plan_sampling
from align.plan.origins import Origin
from align.plan.pushed import note_own_push, plan_push
from align.plan.setting import Result, Setting, StagePlan, origin_of
from align.plan.trained import plan_ppo, plan_training

Planner = Callable[[StagePlan, Any, Setting], Result]
"""Fills a plan from a stage's config and says what the stage leaves."""

PLANNERS: dict[str, Planner] = {
    "sft": plan_training,
    "reward": plan_training,
    "dpo": plan_training,
    "ppo": plan_ppo,
    "sample": plan_sampling,
    "average": plan_average,
    "eval": plan_evaluation,
    "push": plan_push,
}
"""Kind of a stage -> its planner. A kind without one gets a line that says so."""


def plan_stage(name: str, kind: str, config: StageConfig, setting: Setting) -> StagePlan:
    """Plan one stage and remember what it leaves for those after it."""
    launch = config.launch
    plan = StagePlan(name, kind, gpus=setting.gpus or launch.num_processes)
    planner = PLANNERS.get(kind)
    if planner is None:
        plan.notes.append(f"stages of kind `{kind}` are not planned: no memory, no time")
        setting.results[name] = Result(_passed_on(config, setting))
        return plan
    try:
        result = planner(plan, config, setting)
        setting.results[name] = replace(result, artifact=plan.disk.get("artifact"))
        note_own_push(plan, config, setting.results[name])
    except AlignError as error:
        problem = error.problems[0]
        plan.notes.append(f"not planned: {problem.where}: {problem.message}. {problem.hint or ''}")
        setting.results[name] = Result()
    setting.fetched.update(plan.downloads)
    return plan


def _passed_on(config: StageConfig, setting: Setting) -> Origin | None:
    """The model that a stage of an unknown kind starts from: later stages most likely have its shape."""
    model = getattr(config, "model", None)
    name = getattr(model, "model_name_or_path", None)
    try:
        return origin_of(name, setting) if name else None
    except AlignError:
        return None
