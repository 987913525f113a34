"""Plans of the stages that train: `sft`, `reward`, `dpo` and `ppo`."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.config.references import is_reference
from align.config.sharding import SHARDED_STAGES, asked_sharding
from align.errors import AlignError
from align.plan.memory import (
    CONTEXT,
    Training,
    generation_memory,
    optimizer_bytes,
    training_memory,
    weight_bytes,
)
from align.plan.origins import Origin
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
from align.plan.shapes import Shape
from align.plan.speed import forward_seconds, generation_seconds, training_seconds


def plan_training(plan: StagePlan, config: Any, setting: Setting) -> Result:
    """`sft`, `reward`, `dpo`: a fixed number of rows through TRL's trainers."""
    rows = take_rows(plan, config, setting)
    origin = take_model(plan, config, setting)
    shape = origin.shape
    if shape is None:
        return Result(origin)
    plan.length = length_of(config.data, shape)
    given = _step(plan, config, setting, origin)
    plan.training, plan.trainable = given, given.adapter or given.shape.parameters
    _fill_memory(plan, config, setting, given)
    per_row = min(rows.tokens, plan.length) if rows.tokens is not None else float(plan.length)
    plan.tokens_are_bound = rows.tokens is None
    sides = 2 if plan.kind in ("reward", "dpo") else 1
    _count_steps(plan, config, per_row)
    epochs = config.trainer.num_train_epochs
    if plan.rows is not None:
        plan.tokens = plan.rows * epochs * per_row * sides
    trainer = config.trainer
    packed = getattr(config.data, "packing", False)
    width = plan.length if packed else per_row
    micro = trainer.per_device_train_batch_size * sides * width
    passes = 1.0 if plan.kind == "dpo" else 0.0
    once = training_seconds(
        replace(given, tokens=round(micro)), setting.gpu, length=plan.length, passes=passes
    )
    rows_a_pass = trainer.per_device_train_batch_size * (plan.length / per_row if packed else 1)
    plan.seconds_per_1k = 1000 / rows_a_pass * once / plan.gpus
    if plan.steps is not None:
        plan.seconds = plan.steps * trainer.gradient_accumulation_steps * once
    return _leave(plan, config, origin, given)


def _fill_memory(plan: StagePlan, config: Any, setting: Setting, given: Training) -> None:
    rows = config.trainer.per_device_train_batch_size
    plan.micro_batch, plan.accumulation = rows, config.trainer.gradient_accumulation_steps
    plan.memory = with_slack(training_memory(given))

    def fits(count: int) -> bool:
        bigger = replace(given, tokens=given.tokens // rows * count)
        return with_slack(training_memory(bigger)).total <= setting.gpu.usable

    plan.largest_micro_batch = largest(fits)


def _count_steps(plan: StagePlan, config: Any, per_row: float) -> None:
    trainer = config.trainer
    if trainer.max_steps > 0:
        plan.steps = trainer.max_steps
        return
    if plan.rows is None:
        return
    sequences = float(plan.rows)
    if getattr(config.data, "packing", False):
        sequences = math.ceil(plan.rows * per_row / plan.length)
    batch = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * plan.gpus
    plan.steps = max(math.ceil(sequences / batch * trainer.num_train_epochs), 1)


def _leave(plan: StagePlan, config: Any, origin: Origin, given: Training) -> Result:
    """Disk of the run, and what later stages find."""
    shape, trainer = given.shape, config.trainer
    merged = getattr(config, "merge_adapter", False) or not given.adapter
    if given.master_weights:
        given = replace(given, weights="float32")
    each = (
        given.adapter_bytes
        if given.adapter
        else weight_bytes(shape, given.weights) / shape.parameters
    )
    artifact = weight_bytes(shape, given.weights) if merged else float(given.adapter * each)
    plan.disk["artifact"] = artifact
    if plan.steps is None or plan.steps >= trainer.save_steps:
        one = plan.trainable * (each + optimizer_bytes(given.optimizer, each))
        kept = trainer.save_total_limit or max((plan.steps or 0) // trainer.save_steps, 1)
        plan.disk["checkpoints"] = one * kept
    leaves = replace(origin, adapter=0 if merged else given.adapter, download=None)
    return Result(replace(leaves, dtype=given.weights if merged else origin.dtype))


def plan_ppo(plan: StagePlan, config: Any, setting: Setting) -> Result:
    """Policy, value and reward adapters on one base; rollouts and updates take turns."""
    rows = take_rows(plan, config, setting)
    origin = take_model(plan, config, setting)
    shape = origin.shape
    if shape is None:
        return Result(origin)
    generation, trainer = config.generation, config.trainer
    prompt = length_of(config.data, shape)
    plan.length = prompt + generation.max_new_tokens
    given = _step(plan, config, setting, origin)
    own_value = config.value_model == "adapter"
    if given.adapter:
        # Value and its optimizer beside the policy's; the reward's adapter is frozen.
        policy = given.adapter
        given = replace(given, adapter=policy * (2 if own_value else 1))
        given = replace(
            given, extra=_reward_bytes(config, setting, shape, policy * given.adapter_bytes)
        )
    plan.training, plan.trainable = given, given.adapter or given.shape.parameters
    _fill_memory(plan, config, setting, given)
    live = generation.generation_batch_size
    draw = generation_memory(
        shape, given.weights, sequences=live, prompt=prompt, new=generation.max_new_tokens,
        prompts=math.ceil(live / generation.num_generations), beside=_lasting(given) + given.extra,
    )  # fmt: skip
    draw = with_slack(draw)
    if plan.memory is not None and draw.total > plan.memory.total:
        plan.memory = replace(draw, phase="rollout")
    episodes_a_step = (
        trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * plan.gpus
    )
    episodes = config.total_episodes
    if episodes is None and plan.rows is not None:
        episodes = math.ceil(plan.rows * trainer.num_train_epochs * generation.num_generations)
    if trainer.max_steps > 0:
        plan.steps = trainer.max_steps
        episodes = math.ceil(plan.steps * episodes_a_step / config.num_ppo_epochs)
    elif episodes is not None:
        plan.steps = math.ceil(episodes * config.num_ppo_epochs / episodes_a_step)
    plan.notes.append(
        f"{episodes_a_step * config.num_mini_batches:,} episodes per rollout, "
        f"{config.num_mini_batches * config.num_ppo_epochs} optimizer steps on each"
    )
    known = min(rows.tokens, prompt) if rows.tokens is not None else float(prompt)
    plan.tokens_are_bound = True
    each = _episode_seconds(plan, config, setting, given, known)
    plan.seconds_per_1k = 1000 * each * generation.num_generations / plan.gpus
    if episodes is not None:
        plan.tokens = episodes * (known + generation.max_new_tokens)
        plan.seconds = episodes * each / plan.gpus
    return _leave(plan, config, origin, given)


def _reward_bytes(config: Any, setting: Setting, shape: Shape, shared: int) -> int:
    """What the reward model takes: an adapter on the policy's base (`shared`), or weights of its own."""
    name = config.scorer.reward_model
    if name is None:
        return 0
    try:
        reward = origin_of(name, setting)
    except AlignError:  # of an unknown shape: taken for an adapter
        return shared
    full = is_reference(name) or (Path(name) / "config.json").is_file()
    own = full and not reward.adapter
    if reward.shape is None or (reward.shape.parameters == shape.parameters and not own):
        return shared
    return round(weight_bytes(reward.shape.without_head(), reward.dtype))


def _lasting(given: Training) -> float:
    memory = training_memory(given)
    return memory.adapters + memory.optimizer


def _episode_seconds(
    plan: StagePlan, config: Any, setting: Setting, given: Training, prompt: float
) -> float:
    """Draw, score with reference, value and reward, then train policy and value."""
    generation, shape = config.generation, given.shape
    drawn = generation_seconds(
        shape, setting.gpu, weights=weight_bytes(shape, given.weights), prompts=1,
        samples=generation.num_generations, prompt=prompt, new=generation.max_new_tokens,
        batch=generation.generation_batch_size,
    ) / generation.num_generations  # fmt: skip
    tokens = prompt + generation.max_new_tokens
    scored = forward_seconds(shape, setting.gpu, 4 * tokens)
    rows = config.trainer.per_device_train_batch_size
    step = training_seconds(
        replace(given, tokens=round(rows * tokens)), setting.gpu, length=plan.length
    )
    roles = 2 if config.value_model == "adapter" else 1
    return float(drawn + scored + roles * config.num_ppo_epochs * step / rows)


def _trained(config: Any, origin: Origin) -> tuple[int, str]:
    """Parameters of the adapter (0: all are trained), and the way in words."""
    lora, shape = config.lora, origin.shape
    assert shape is not None
    if config.model.continues_adapter and origin.adapter:
        return origin.adapter, "continues an adapter"
    if not lora.use_peft:
        return 0, "full"
    count = shape.adapter(lora.lora_r, lora.lora_target_modules)
    if lora.use_dora:
        count += sum(one.outputs for layer in range(shape.layers) for one in shape.block(layer))
    count += sum(
        shape.embedding
        for one in lora.lora_modules_to_save or ()
        if one in ("lm_head", "embed_tokens")
    )
    quantized = config.model.load_in_4bit or config.model.load_in_8bit
    kind = "QLoRA" if quantized else "DoRA" if lora.use_dora else "LoRA"
    return count, f"{kind} r {lora.lora_r}"


def _step(plan: StagePlan, config: Any, setting: Setting, origin: Origin) -> Training:
    """The training step of a stage for the memory model."""
    shape, trainer, gpu = origin.shape, config.trainer, setting.gpu
    assert shape is not None
    adapter, plan.way = _trained(config, origin)
    weights = weights_of(config.model, origin, full=not adapter)
    quantized = config.model.load_in_4bit or config.model.load_in_8bit
    if plan.kind == "reward" and adapter:
        adapter += shape.hidden
    sides = 1 if plan.kind in ("sft", "ppo") else 2
    if plan.kind == "reward":
        shape = shape.without_head()
    kwargs = trainer.extra.get("gradient_checkpointing_kwargs")
    if kwargs:
        plan.notes.append("`extra.gradient_checkpointing_kwargs` is not in the estimate")
    autocast = gpu.bfloat16 if trainer.bf16 is None else trainer.bf16
    shards = plan.gpus if asked_sharding(config.launch) and plan.kind in SHARDED_STAGES else 1
    master = shards > 1 and not adapter and autocast
    if master:
        weights, autocast = "bfloat16", False
    return Training(
        shape,
        tokens=trainer.per_device_train_batch_size * sides * plan.length,
        weights=weights,
        adapter=adapter,
        adapter_bytes=2 if quantized or weights == "float16" else 4,
        optimizer=trainer.optim,
        optimizer_on_host="paged" in trainer.optim,
        checkpointing="full" if trainer.gradient_checkpointing else "none",
        autocast=autocast,
        dropout=config.lora.lora_dropout > 0,
        loss="none" if plan.kind == "reward" else "tiles",
        shards=shards,
        master_weights=master,
        replicas=plan.gpus if shards == 1 else 1,
        reference=plan.kind in ("dpo", "ppo") and not adapter,
        context=CONTEXT,
    )
