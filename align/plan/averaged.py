"""Plan of the stage `average`, which reads and writes files on the CPU."""

from dataclasses import replace
from typing import Any

from align.plan.memory import weight_bytes
from align.plan.setting import Result, Setting, StagePlan, origin_of

SHARD = 5e9
"""Bytes of the largest file of a saved model."""


def plan_average(plan: StagePlan, config: Any, setting: Setting) -> Result:
    """Files of several models become one; no GPU takes part."""
    origins = [origin_of(name, setting) for name in config.models.values()]
    first, count = origins[0], len(origins) * (config.checkpoints or 1)
    plan.model, plan.gpus = ", ".join(config.models), 0
    adapter = bool(first.adapter) and config.method != "merge"
    plan.way = f"the mean of {count}" + (f" ({config.method})" if first.adapter else "")
    # Nothing is known of the disk; minutes even for the largest, beside hours of the other stages.
    plan.seconds = 0.0
    plan.notes.append("reads and writes files on the CPU: its time is not in the total")
    if first.shape is None:
        plan.notes.append("the shape of the models is not known before they are there")
        return Result(replace(first, download=None))
    plan.shape, plan.parameters = first.shape, first.shape.parameters
    whole = weight_bytes(first.shape, first.dtype)
    if not adapter:
        plan.disk["artifact"] = whole
        merges = first.adapter or (config.checkpoints and config.method == "merge")
        whole_models = 2 * weight_bytes(first.shape, "float32")
        in_memory = whole_models if merges else 3 * min(whole, SHARD)
        plan.notes.append(f"about {in_memory / 2**30:.2g} GiB of the machine's own memory")
        return Result(replace(first, adapter=0, download=None))
    ranks = count if config.method == "cat" else 1
    plan.trainable = first.adapter * ranks
    plan.disk["artifact"] = 4.0 * plan.trainable
    return Result(replace(first, adapter=plan.trainable, download=None))
