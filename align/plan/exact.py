"""`align plan --exact`: the stages of a plan as steps on fake tensors. torch is imported when it is called."""

import time
from collections.abc import Mapping
from typing import Any

from align.plan.memory import training_memory
from align.plan.report import Plan
from align.plan.setting import StagePlan
from align.report.terminal import say

COUNTED = ("sft", "reward", "dpo")
"""Kinds whose step can be run on fake tensors."""


def count_exactly(plan: Plan, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Run one training step of every stage under FakeTensorMode and count its bytes.

    Returns:
        Per stage the peak, its components, when it is, what the formulas say of the same tensors
        and the seconds it took; or the reason why a stage cannot be counted.
    """
    found = []
    for stage in plan.stages:
        reason = _cannot(stage)
        if reason is not None:
            found.append({"stage": stage.name, "reason": reason})
            continue
        if not quiet:
            say(f"{stage.name}: one step on fake tensors ...")
        found.append(_count(stage, plan.configs[stage.name]))
    return found


def _cannot(stage: StagePlan) -> str | None:
    if stage.kind not in COUNTED:
        return f"not counted: `{stage.kind}` is no step of TRL's trainers"
    if stage.training is None:
        return "not counted: the shape of its model is not known"
    if stage.training.weights == "int8":
        return "not counted: 8-bit weights have no fake form yet"
    return None


def _count(stage: StagePlan, config: Any) -> dict[str, Any]:
    from align.training.fake_step import Step, fake_step

    given, lora = stage.training, config.lora
    assert given is not None
    rows = config.trainer.per_device_train_batch_size * (1 if stage.kind == "sft" else 2)
    started = time.monotonic()
    counted = fake_step(
        Step(
            config=dict(given.shape.config),
            loss=stage.kind,
            weights=given.weights,
            rows=rows,
            length=stage.length,
            checkpointing=given.checkpointing != "none",
            autocast=given.autocast,
            lora=_adapter(lora) if given.adapter else None,
            optimizer=given.optimizer,
        )
    )
    formula = training_memory(given)
    return {
        "stage": stage.name,
        "peak": counted.peak,
        "where": counted.where,
        "parts": counted.at_peak,
        "phases": counted.phases,
        "parameters": counted.parameters,
        "trainable": counted.trainable,
        "formula": formula.total - formula.overhead,
        "seconds": round(time.monotonic() - started, 1),
    }


def _adapter(lora: Any) -> Mapping[str, Any]:
    return {
        "r": lora.lora_r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": lora.lora_target_modules,
        "modules_to_save": lora.lora_modules_to_save,
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }
