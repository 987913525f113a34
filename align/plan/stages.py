"""What each stage of a recipe will need: one planner per kind of stage, fed with what earlier stages leave."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.config.references import FORM, is_reference
from align.config.sections import DataSection, StageConfig
from align.errors import AlignError
from align.plan.gpus import Gpu
from align.plan.memory import (
    CONTEXT,
    SLACK,
    Memory,
    Training,
    generation_memory,
    optimizer_bytes,
    training_memory,
    weight_bytes,
)
from align.plan.origins import Origin, find_origin
from align.plan.rows import Rows, rows_of
from align.plan.shapes import Shape
from align.plan.speed import forward_seconds, generation_seconds, training_seconds

UNBOUNDED = 2048
"""Tokens of a row where the recipe sets no bound."""

MOST_ROWS = 4096
"""Largest micro-batch that is looked for."""


@dataclass(frozen=True)
class Result:
    """What a stage leaves for later ones."""

    origin: Origin | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    """File of a `sample` artifact -> rows at most."""


@dataclass
class Setting:
    """What all stages of a plan share."""

    gpu: Gpu
    gpus: int | None
    """Asked for on the command line; the recipe's own number of processes when None."""
    folder: Path
    """Folder of the recipe."""
    results: dict[str, Result] = field(default_factory=dict)
    fetched: set[str] = field(default_factory=set)
    """Hub ids that an earlier stage downloads already."""


@dataclass
class StagePlan:
    """One stage: what it takes, in bytes, tokens and seconds. None where nobody can know yet."""

    name: str
    kind: str
    model: str = ""
    way: str = ""
    """`full`, `LoRA r 16`, `QLoRA r 16`, or what the stage does with the model."""
    shape: Shape | None = None
    parameters: int | None = None
    trainable: int = 0
    rows: int | None = None
    rows_source: str = ""
    tokens: float | None = None
    tokens_are_bound: bool = False
    """Whether `tokens` is an upper bound (every row as long as it may be)."""
    steps: int | None = None
    memory: Memory | None = None
    gpus: int = 1
    micro_batch: int | None = None
    accumulation: int | None = None
    largest_micro_batch: int | None = None
    seconds: float | None = None
    seconds_per_1k: float | None = None
    disk: dict[str, float] = field(default_factory=dict)
    downloads: dict[str, float | None] = field(default_factory=dict)
    pushes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    training: Training | None = None
    """The step as the memory model saw it."""
    length: int = 0

    def fits(self, gpu: Gpu) -> bool | None:
        """Whether the peak is within the GPU's memory; None where the peak is not known."""
        return None if self.memory is None else self.memory.total <= gpu.usable


Planner = Callable[[StagePlan, StageConfig, Setting], Result]


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
        setting.results[name] = planner(plan, config, setting)
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
        return _origin(name, setting) if name else None
    except AlignError:
        return None


def _origin(name: str, setting: Setting) -> Origin:
    """The model behind a Hub id, a folder, or the `$name` of an earlier stage."""
    match = FORM.fullmatch(name)
    if match is None:
        return find_origin(name, setting.folder)
    earlier = setting.results.get(match[1])
    if earlier is None or earlier.origin is None:
        return Origin(name, None)
    return replace(earlier.origin, label=name, download=None)


def _read_rows(data: DataSection, setting: Setting) -> Rows:
    name = data.dataset_name
    if name is None or not is_reference(name):
        return rows_of(data)
    match = FORM.fullmatch(name)
    assert match is not None
    count = setting.results.get(match[1], Result()).rows.get(match[2] or "")
    if count is not None and data.test_split_size:
        count -= round(count * data.test_split_size)
    if count is not None and data.max_samples:
        count = min(count, data.max_samples)
    return Rows(count, None, f"at most, from `{match[1]}`")


def _weights(model: Any, origin: Origin, *, full: bool) -> str:
    """The number format of the base, by the rules of `align.models.loading`."""
    if model.load_in_4bit:
        return "nf4-double" if model.use_bnb_nested_quant else "nf4"
    if model.load_in_8bit:
        return "int8"
    if model.dtype != "auto":
        return str(model.dtype)
    return "float32" if full else origin.dtype


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
    weights = _weights(config.model, origin, full=not adapter)
    quantized = config.model.load_in_4bit or config.model.load_in_8bit
    if plan.kind == "reward" and adapter:
        adapter += shape.hidden
    sides = 1 if plan.kind in ("sft", "ppo") else 2
    kwargs = trainer.extra.get("gradient_checkpointing_kwargs")
    if kwargs:
        plan.notes.append("`extra.gradient_checkpointing_kwargs` is not in the estimate")
    return Training(
        shape,
        tokens=trainer.per_device_train_batch_size * sides * plan.length,
        weights=weights,
        adapter=adapter,
        adapter_bytes=2 if quantized or weights == "float16" else 4,
        optimizer=trainer.optim,
        optimizer_on_host="paged" in trainer.optim,
        checkpointing="full" if trainer.gradient_checkpointing else "none",
        autocast=gpu.bfloat16 if trainer.bf16 is None else trainer.bf16,
        dropout=config.lora.lora_dropout > 0,
        loss="none" if plan.kind == "reward" else "tiles",
        replicas=plan.gpus,
        reference=plan.kind in ("dpo", "ppo") and not adapter,
        context=CONTEXT,
    )


def _with_slack(memory: Memory) -> Memory:
    tensors = memory.total - memory.overhead
    return replace(memory, overhead=memory.overhead + SLACK * tensors)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest micro-batch that fits, by bisection; 0 where not even one row does."""
    if not fits(1):
        return 0
    low, high = 1, MOST_ROWS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _length(data: DataSection, shape: Shape) -> int:
    return data.max_length or min(shape.positions or UNBOUNDED, UNBOUNDED)


def _take_model(plan: StagePlan, config: Any, setting: Setting) -> Origin:
    plan.model = config.model.model_name_or_path
    origin = _origin(plan.model, setting)
    adapter = config.model.adapter_name_or_path
    if adapter is not None:
        beside = _origin(adapter, setting)
        origin = replace(origin, adapter=beside.adapter)
    plan.model = origin.label
    if origin.download and origin.shape and origin.download not in setting.fetched:
        plan.downloads[origin.download] = 2.0 * origin.shape.parameters
    if origin.shape is None:
        plan.notes.append(f"the shape of {origin.label} is not known before it is there")
    else:
        plan.shape, plan.parameters = origin.shape, origin.shape.parameters
    return origin


def _take_rows(plan: StagePlan, config: Any, setting: Setting) -> Rows:
    rows = _read_rows(config.data, setting)
    plan.rows, plan.rows_source = rows.count, rows.source
    plan.downloads.update({one: None for one in rows.downloads if one not in setting.fetched})
    return rows


def _training(plan: StagePlan, config: Any, setting: Setting) -> Result:
    """`sft`, `reward`, `dpo`: a fixed number of rows through TRL's trainers."""
    rows = _take_rows(plan, config, setting)
    origin = _take_model(plan, config, setting)
    shape = origin.shape
    if shape is None:
        return Result(origin)
    plan.length = _length(config.data, shape)
    given = _step(plan, config, setting, origin)
    plan.training, plan.trainable = given, given.adapter or shape.parameters
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
    plan.memory = _with_slack(training_memory(given))

    def fits(count: int) -> bool:
        bigger = replace(given, tokens=given.tokens // rows * count)
        return _with_slack(training_memory(bigger)).total <= setting.gpu.usable

    plan.largest_micro_batch = _largest(fits)


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


def _ppo(plan: StagePlan, config: Any, setting: Setting) -> Result:
    """Policy, value and reward adapters on one base; rollouts and updates take turns."""
    rows = _take_rows(plan, config, setting)
    origin = _take_model(plan, config, setting)
    shape = origin.shape
    if shape is None:
        return Result(origin)
    generation, trainer = config.generation, config.trainer
    prompt = _length(config.data, shape)
    plan.length = prompt + generation.max_new_tokens
    given = _step(plan, config, setting, origin)
    own_value = config.value_model == "adapter"
    if given.adapter:
        # Value and its optimizer beside the policy's; the reward's adapter is frozen.
        policy = given.adapter
        given = replace(given, adapter=policy * (2 if own_value else 1))
        given = replace(
            given, extra=policy * given.adapter_bytes if config.scorer.reward_model else 0
        )
    plan.training, plan.trainable = given, given.adapter or shape.parameters
    _fill_memory(plan, config, setting, given)
    live = generation.generation_batch_size
    draw = generation_memory(
        shape, given.weights, sequences=live, prompt=prompt, new=generation.max_new_tokens,
        prompts=math.ceil(live / generation.num_generations), beside=_lasting(given),
    )  # fmt: skip
    draw = _with_slack(draw)
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


def _sample(plan: StagePlan, config: Any, setting: Setting) -> Result:
    """Rejection sampling: K completions per prompt, scored."""
    rows = _take_rows(plan, config, setting)
    origin = _take_model(plan, config, setting)
    plan.way = f"draws {config.generation.num_generations} per prompt"
    best = config.pairs.keep_best * (plan.rows or 0)
    pairs = config.pairs.pairs_per_prompt * (plan.rows or 0)
    made = {"sft.jsonl": best, "pairs.jsonl": pairs} if plan.rows is not None else {}
    shape = origin.shape
    if shape is None:
        return Result(None, made)
    weights = _weights(config.model, origin, full=False)
    scorer = 0.0
    if config.scorer.reward_model:
        reward = _origin(config.scorer.reward_model, setting)
        scorer = weight_bytes(reward.shape or shape, reward.dtype)
        plan.notes.append("the reward model scores after the draws of a part, beside the policy")
    generation = config.generation
    _draw(
        plan, setting, origin, weights, rows, prompt=_length(config.data, shape),
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
        return _with_slack(found)

    plan.memory, plan.micro_batch = needed(live), live
    plan.largest_micro_batch = _largest(lambda count: needed(count).total <= setting.gpu.usable)
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


def _evaluate(plan: StagePlan, config: Any, setting: Setting) -> Result:
    """Every model answers the same prompts at every temperature."""
    origins = [_origin(name, setting) for name in config.models.values()]
    shaped = [one for one in origins if one.shape is not None]
    plan.model = ", ".join(config.models)
    rows = _take_rows(plan, config, setting)
    for one in origins:
        if one.download and one.shape and one.download not in setting.fetched:
            plan.downloads[one.download] = 2.0 * one.shape.parameters
    answers = len(config.generation.temperatures)
    extra = sum(config.best_of.values())
    plan.way = f"{len(origins)} models answer"
    if not shaped:
        plan.notes.append("the shapes of the models are not known before they are there")
        return Result()
    largest = max(shaped, key=lambda one: one.shape.parameters if one.shape else 0)
    assert largest.shape is not None
    plan.shape, plan.parameters = largest.shape, largest.shape.parameters
    _draw(
        plan, setting, largest, largest.dtype, rows, prompt=_length(config.data, largest.shape),
        samples=1, generation=config.generation, models=len(origins) * answers + extra,
    )  # fmt: skip
    return Result()


PLANNERS: dict[str, Planner] = {
    "sft": _training,
    "reward": _training,
    "dpo": _training,
    "ppo": _ppo,
    "sample": _sample,
    "eval": _evaluate,
}
"""Kind of a stage -> its planner. A kind without one gets a line that says so."""
