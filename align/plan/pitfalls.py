"""Combinations that are known to fail or to train badly, each with the way out."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from align.config.sections import StageConfig
from align.errors import Problem
from align.plan.gpus import GPUS, Gpu
from align.plan.memory import training_memory
from align.plan.stages import StagePlan

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
    yield Problem(message, plan.name, "; ".join(_ways_out(plan, config, gpu)))


def _ways_out(plan: StagePlan, config: Any, gpu: Gpu) -> Iterator[str]:
    """Settings that make the stage fit, tried one by one; then the GPUs that hold it as it is."""
    assert plan.memory is not None
    trainer = getattr(config, "trainer", None)
    tried = []
    if plan.largest_micro_batch and trainer is not None:
        yield f"trainer.per_device_train_batch_size: {plan.largest_micro_batch}"
    elif plan.largest_micro_batch:
        yield f"generation.generation_batch_size: {plan.largest_micro_batch}"
    given = plan.training
    if given is not None and not plan.largest_micro_batch and trainer is not None:
        one = replace(given, tokens=given.tokens // trainer.per_device_train_batch_size)
        light = replace(one, checkpointing="full")
        shape = given.shape
        adapter = given.adapter or shape.adapter(16, "all-linear")
        lora = replace(light, weights="bfloat16", adapter=adapter, adapter_bytes=4, reference=False)
        ways = (
            ("trainer.gradient_checkpointing: true, batch size 1", light),
            ("LoRA (lora.use_peft: true, model.dtype: bfloat16), batch size 1", lora),
            (
                "QLoRA (model.load_in_4bit: true, lora.use_peft: true), batch size 1",
                replace(lora, weights="nf4-double", adapter_bytes=2),
            ),
        )
        for text, way in ways:
            if way != one and training_memory(way).total * 1.04 <= gpu.usable:
                tried.append(text)
        yield from tried[:2]
    bigger = [one for one in GPUS.values() if plan.memory.total <= one.usable]
    if bigger:
        names = sorted(bigger, key=lambda one: one.memory)[:3]
        yield f"--gpu {' or '.join(one.name for one in names)}"
    elif not tried and not plan.largest_micro_batch:
        yield "no single GPU holds it, and align's stages hold the whole model on each"


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
    if config.launch.accelerate in ("fsdp2", "zero3"):
        yield Problem(
            f"`{config.launch.accelerate}` shards the weights, which align's stages refuse so far",
            "launch.accelerate",
            "use `ddp`; LoRA or QLoRA makes large models fit",
        )


def _training(plan: StagePlan, config: Any) -> Iterator[Problem]:
    given = plan.training
    if given is None:
        return
    trainer = config.trainer
    if not given.adapter:
        if given.weights in ("bfloat16", "float16"):
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
    if given.shape.experts:
        yield Problem(
            "experts are one fused parameter in transformers 5: neither 4-bit nor LoRA reaches them",
            "model.model_name_or_path",
            "plan for 16-bit experts; the adapter trains attention and shared layers",
        )
