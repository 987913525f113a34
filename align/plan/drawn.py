"""Plans of the stages that draw completions: `sample` and `eval`."""

import math
from typing import Any

from align.plan.memory import Memory, generation_memory, weight_bytes
from align.plan.origins import Origin
from align.plan.rows import Rows
from align.plan.setting import (
    Result,
    Setting,
    StagePlan,
    largest,
    length_of,
    origin_of,
    take_model,
    take_rows,
    weights_of,
    with_slack,
)
from align.plan.speed import forward_seconds, generation_seconds


def plan_sampling(plan: StagePlan, config: Any, setting: Setting) -> Result:
    """Rejection sampling: K completions per prompt, scored."""
    rows = take_rows(plan, config, setting)
    origin = take_model(plan, config, setting)
    plan.way = f"draws {config.generation.num_generations} per prompt"
    best = config.pairs.keep_best * (plan.rows or 0)
    pairs = config.pairs.pairs_per_prompt * (plan.rows or 0)
    made = {"sft.jsonl": best, "pairs.jsonl": pairs} if plan.rows is not None else {}
    shape = origin.shape
    if shape is None:
        return Result(None, made)
    weights = weights_of(config.model, origin, full=False)
    scorer = 0.0
    if config.scorer.reward_model:
        reward = origin_of(config.scorer.reward_model, setting)
        scorer = weight_bytes((reward.shape or shape).without_head(), reward.dtype)
        plan.notes.append("the reward model scores after the draws of a part, beside the policy")
    generation = config.generation
    _draw(
        plan, setting, origin, weights, rows, prompt=length_of(config.data, shape),
        samples=generation.num_generations, generation=generation, beside=scorer,
    )  # fmt: skip
    plan.disk["artifact"] = (
        (plan.rows or 0) * generation.num_generations * 6.0 * generation.max_new_tokens
    )
    return Result(None, made)


def _draw(
    plan: StagePlan, setting: Setting, origin: Origin, weights: str, rows: Rows, *, prompt: int,
    samples: int, generation: Any, beside: float = 0.0, models: int = 1,
) -> None:  # fmt: skip
    """Fill memory and time of drawing `samples` completions to every prompt."""
    shape = origin.shape
    assert shape is not None
    plan.length = prompt + generation.max_new_tokens
    live, new = generation.generation_batch_size, generation.max_new_tokens
    adapter = origin.adapter

    def needed(count: int) -> Memory:
        found = generation_memory(
            shape, weights, sequences=count, prompts=math.ceil(count / samples), prompt=prompt,
            new=new, adapter=adapter, beside=beside,
        )  # fmt: skip
        return with_slack(found)

    plan.memory, plan.micro_batch = needed(live), live
    plan.largest_micro_batch = largest(lambda count: needed(count).total <= setting.gpu.usable)
    known = min(rows.tokens, prompt) if rows.tokens is not None else float(prompt)
    plan.tokens_are_bound = True
    seconds = models * generation_seconds(
        shape, setting.gpu, weights=weight_bytes(shape, weights), prompts=1000, samples=samples,
        prompt=known, new=new, batch=live,
    )  # fmt: skip
    if beside:
        seconds += forward_seconds(shape, setting.gpu, 1000 * samples * (known + new))
    plan.seconds_per_1k = seconds / plan.gpus
    if plan.rows is not None:
        plan.seconds = plan.rows / 1000 * plan.seconds_per_1k
        plan.tokens = float(plan.rows) * samples * new * models


def plan_evaluation(plan: StagePlan, config: Any, setting: Setting) -> Result:
    """Every model answers the same prompts at every temperature."""
    origins = [origin_of(name, setting) for name in config.models.values()]
    shaped = [one for one in origins if one.shape is not None]
    plan.model = ", ".join(config.models)
    rows = take_rows(plan, config, setting)
    for one in origins:
        if one.download and one.shape and one.download not in setting.fetched:
            plan.downloads[one.download] = 2.0 * one.shape.parameters
    answers = len(config.generation.temperatures)
    extra = sum(config.best_of.values())
    plan.way = f"{len(origins)} models answer"
    if not shaped:
        plan.notes.append("the shapes of the models are not known before they are there")
        return Result()
    biggest = max(shaped, key=lambda one: one.shape.parameters if one.shape else 0)
    assert biggest.shape is not None
    plan.shape, plan.parameters = biggest.shape, biggest.shape.parameters
    _draw(
        plan, setting, biggest, biggest.dtype, rows, prompt=length_of(config.data, biggest.shape),
        samples=1, generation=config.generation, models=len(origins) * answers + extra,
    )  # fmt: skip
    return Result()
