"""Combinations that are known to fail or to train badly, each with the way out."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from align.config.sections import StageConfig
from align.errors import Problem
from align.plan.gpus import GPUS, Gpu
from align.plan.memory import NF4, SLACK, Training, training_memory
from align.plan.setting import StagePlan

LORA_RATE = 5e-5
"""Learning rates above this are made for adapters; full fine-tuning diverges or forgets."""


def pitfalls(plan: StagePlan, config: StageConfig, gpu: Gpu) -> list[Problem]:
    """What will go wrong with a stage on this kind of GPU."""
    found = list(_memory(plan, config, gpu))
    found += _hardware(config, gpu)
    found += _training(plan, config)
    if plan.shape is not None and 0 < plan.shape.positions < plan.length:
        found.append(
            Problem(
                f"sequences of {plan.length:,} tokens, and the model was made for {plan.shape.positions:,}",
                "data.max_length",
                "lower data.max_length (and generation.max_new_tokens)",
            )
        )
    return found


def _memory(plan: StagePlan, config: Any, gpu: Gpu) -> Iterator[Problem]:
    if plan.memory is None or plan.fits(gpu):
        return
    message = (
        f"needs {plan.memory.total / 2**30:.1f} GiB per GPU, and {gpu.name} has "
        f"{gpu.usable / 2**30:.1f} to give"
    )
    ways = "; ".join(_ways_out(plan, config, gpu))
    nothing = "no single GPU holds it in any of the ways here: take a smaller model"
    yield Problem(message, plan.name, ways or nothing)


def _ways_out(plan: StagePlan, config: Any, gpu: Gpu) -> Iterator[str]:
    """Settings that make the stage fit, tried one by one; then the GPUs that hold it as it is."""
    assert plan.memory is not None
    trainer = getattr(config, "trainer", None)
    if plan.memory.phase == "rollout":
        yield "lower generation.generation_batch_size"
    elif plan.largest_micro_batch and trainer is not None:
        yield f"trainer.per_device_train_batch_size: {plan.largest_micro_batch}"
    elif plan.largest_micro_batch:
        yield f"generation.generation_batch_size: {plan.largest_micro_batch}"
    given = plan.training
    if given is not None and not plan.largest_micro_batch and trainer is not None:
        yield from list(_lighter(given, trainer.per_device_train_batch_size, gpu))[:2]
    bigger = _smallest_gpus(plan.memory.total)
    if bigger:
        yield f"--gpu {' or '.join(bigger)}"


def _lighter(given: Training, rows: int, gpu: Gpu) -> Iterator[str]:
    """Ways to train that fit the GPU with one row, or the smallest GPU that they fit."""
    one = replace(given, tokens=given.tokens // rows)
    light = replace(one, checkpointing="full")
    adapter = given.adapter or given.shape.adapter(16, "all-linear")
    lora = replace(light, weights="bfloat16", adapter=adapter, adapter_bytes=4, reference=False)
    qlora = replace(lora, weights="nf4-double", adapter_bytes=2)
    ways = (
        ("trainer.gradient_checkpointing: true", light),
        ("LoRA (lora.use_peft: true, model.dtype: bfloat16)", lora),
        ("QLoRA (lora.use_peft: true, model.load_in_4bit: true)", qlora),
    )
    needed = {text: training_memory(way).total * (1 + SLACK) for text, way in ways if way != one}
    yield from (f"{text}, batch size 1" for text, size in needed.items() if size <= gpu.usable)
    for text, size in needed.items():
        elsewhere = _smallest_gpus(size)[:1]
        if size > gpu.usable and elsewhere:
            yield f"{text}, batch size 1, on one {elsewhere[0]}"


def _smallest_gpus(needed: float) -> list[str]:
    """Names of up to three kinds that hold so many bytes, the smallest first."""
    kinds = sorted(GPUS.values(), key=lambda one: one.memory)
    return [one.name for one in kinds if needed <= one.usable][:3]


def _hardware(config: Any, gpu: Gpu) -> Iterator[Problem]:
    model, trainer = getattr(config, "model", None), getattr(config, "trainer", None)
    if not gpu.bfloat16:
        asked = trainer is not None and trainer.bf16
        if asked or (model is not None and model.dtype == "bfloat16"):
            yield Problem(
                f"{gpu.name} has no bfloat16 (it is emulated, many times slower)",
                "trainer.bf16" if asked else "model.dtype",
                "set model.dtype: float32, or take an Ampere GPU or newer",
            )
    attention = getattr(model, "attn_implementation", None)
    if not gpu.flash and attention and "flash" in attention:
        yield Problem(
            f"FlashAttention 2 does not run on {gpu.name}",
            "model.attn_implementation",
            "leave it out (sdpa)",
        )


def _training(plan: StagePlan, config: Any) -> Iterator[Problem]:
    given = plan.training
    if given is None:
        return
    trainer = config.trainer
    if not given.adapter:
        if given.weights in ("bfloat16", "float16") and not given.master_weights:
            yield Problem(
                f"all weights are trained in {given.weights}: updates below 1/256 of a weight vanish",
                "model.dtype",
                "leave dtype at auto (float32 with bfloat16 autocast), or train an adapter",
            )
        if trainer.learning_rate > LORA_RATE:
            yield Problem(
                f"{trainer.learning_rate:g} is a learning rate for adapters",
                "trainer.learning_rate",
                "full fine-tuning wants about 1e-5 (5e-7 for DPO)",
            )
        if trainer.optim == "adamw_torch" and plan.memory and plan.memory.phase == "optimizer step":
            size = given.shape.parameters * (4 if given.weights == "float32" else 2) / 2**30
            yield Problem(
                f"`adamw_torch` takes the root of all second moments at once: {size:.1f} GiB for a moment",
                "trainer.optim",
                "adamw_torch_fused does without",
            )
    if given.shape.experts and (given.weights in NF4 or given.weights == "int8"):
        size = 2 * given.shape.fused / 2**30
        yield Problem(
            f"experts are no linear layers in transformers 5, so {size:.0f} GiB of them stay in 16 bits",
            "model.load_in_4bit" if given.weights in NF4 else "model.load_in_8bit",
            "plan for 16-bit experts (the figures above do), or take a dense model",
        )
