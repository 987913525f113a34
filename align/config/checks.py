"""What must hold between the values of a recipe, and which names they may hold.

Each check yields troubles and changes nothing. The types and bounds of single values are the
fields' own.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from align.config.names import (
    DPO_LOSSES,
    F_DIVERGENCE_LOSSES,
    F_DIVERGENCES,
    OPTIMIZERS,
    SCHEDULERS,
    TRACKERS,
)
from align.config.paths import Trouble
from align.config.problems import KeyPath
from align.config.pushing import plain_troubles
from align.config.sections import (
    DataSection,
    HubSection,
    LoraSection,
    ModelSection,
    StageConfig,
    TrainerSection,
)
from align.config.sharding import asked_sharding, sharding_troubles
from align.config.suggest import nearest
from align.registry import Kind, check, check_reward, code_file


def troubles(config: StageConfig) -> Iterator[Trouble]:
    """Everything that is wrong with a config beyond the types of its values."""
    values = {name: getattr(config, name) for name in type(config).model_fields}
    model, lora = values.get("model"), values.get("lora")
    if isinstance(model, ModelSection):
        yield from _model(model)
        if isinstance(lora, LoraSection):
            yield from _lora(model, lora, merged=values.get("merge_adapter", False))
            trainer = values.get("trainer")
            if isinstance(trainer, TrainerSection) and trainer.keep_checkpoints:
                yield from _kept_checkpoints(model, lora, trainer, values["stage"])
    data = values.get("data")
    if isinstance(data, DataSection):
        yield from _data(data)
    trainer = values.get("trainer")
    if isinstance(trainer, TrainerSection):
        yield from _trainer(trainer)
        if isinstance(data, DataSection):
            yield from _evaluation(trainer, data)
    if isinstance(values.get("hub"), HubSection):
        yield from plain_troubles(config)
    yield from sharding_troubles(config, asked_sharding(config.launch))
    checks = {"dpo": _dpo, "sample": _sample, "eval": _eval, "ppo": _ppo, "average": _average}
    if own := checks.get(values["stage"]):
        yield from own(config)


def _name(key: KeyPath, value: str, known: Sequence[str], what: str) -> Iterator[Trouble]:
    if value not in known:
        close = nearest(value, known)
        hint = f"did you mean `{close}`?" if close else f"one of {', '.join(known)}"
        yield Trouble(key, f"names no {what}: `{value}`", hint)


def _registered(key: KeyPath, kind: Kind, value: str | None) -> Iterator[Trouble]:
    hint = check(kind, value) if value is not None else None
    if hint is not None:
        yield Trouble(key, f"names no {kind}: `{value}`", hint)


def _model(model: ModelSection) -> Iterator[Trouble]:
    if model.load_in_4bit and model.load_in_8bit:
        yield Trouble(
            ("model", "load_in_8bit"),
            "and `model.load_in_4bit` are both on",
            "quantize to 4 or to 8 bits",
            ("model.load_in_4bit",),
        )
    if model.chat_template is not None and model.chat_template_path is not None:
        yield Trouble(
            ("model", "chat_template"),
            "and `model.chat_template_path` are both given",
            "keep one of them",
            ("model.chat_template_path",),
        )
    if "adapter_mode" in model.model_fields_set and model.adapter_name_or_path is None:
        yield Trouble(
            ("model", "adapter_mode"),
            "says what becomes of an adapter, and there is none",
            "set `model.adapter_name_or_path`, or leave `adapter_mode` out",
            ("model.adapter_name_or_path",),
        )


def _lora(model: ModelSection, lora: LoraSection, *, merged: bool) -> Iterator[Trouble]:
    on = [key for key in ("load_in_4bit", "load_in_8bit") if getattr(model, key)]
    quantized = on[0] if on else None
    if not lora.use_peft:
        off = ("lora.use_peft",)
        if quantized:
            yield Trouble(
                ("model", quantized),
                "quantizes a base whose weights are all trained (`use_peft: false`)",
                "quantized weights cannot be trained: set `lora.use_peft: true`",
                off,
            )
        if model.continues_adapter:
            yield Trouble(
                ("model", "adapter_mode"),
                "goes on training an adapter, and `lora.use_peft` is off",
                "set `lora.use_peft: true`",
                off,
            )
        if merged:
            yield Trouble(
                ("merge_adapter",),
                "merges an adapter, and `lora.use_peft: false` trains none",
                "leave it out: the artifact is a full model already",
                off,
            )
    elif quantized and merged:
        yield Trouble(
            ("merge_adapter",),
            f"would round the adapter into quantized weights (`model.{quantized}`)",
            "leave it out; the adapter can be merged into the unquantized base later",
            (f"model.{quantized}",),
        )
    stacked = model.adapter_name_or_path and model.adapter_mode != "continue"
    if quantized and lora.use_peft and stacked:
        yield Trouble(
            ("model", "adapter_mode"),
            f"would round the adapter into quantized weights (`model.{quantized}`)",
            "set `model.adapter_mode: continue`, or load the base unquantized",
            (f"model.{quantized}", "model.adapter_name_or_path"),
        )


def _kept_checkpoints(
    model: ModelSection, lora: LoraSection, trainer: TrainerSection, stage: str
) -> Iterator[Trouble]:
    key: KeyPath = ("trainer", "keep_checkpoints")
    if stage == "ppo":
        hint = "average the policies of several runs instead"
        yield Trouble(key, "cannot be used with PPO, whose checkpoints hold several roles", hint)
    if lora.use_peft and model.adapter_name_or_path and not model.continues_adapter:
        message = "would keep adapters of a base that the old adapter is folded into"
        hint = "set `model.adapter_mode: continue`, or start from a full model"
        yield Trouble(key, message, hint, ("model.adapter_name_or_path", "model.adapter_mode"))
    limit, kept = trainer.save_total_limit, trainer.keep_checkpoints or 0
    if limit is not None and limit < kept:
        message = f"keeps more than the {limit} checkpoints that `trainer.save_total_limit` leaves"
        hint = "raise `save_total_limit`"
        yield Trouble(key, message, hint, ("trainer.save_total_limit",))


def _data(data: DataSection) -> Iterator[Trouble]:
    given = (data.dataset_name is not None) + (data.datasets is not None)
    both = ("data.datasets", "data.dataset_name")
    if given == 0:
        hint = "a Hub id, a file (json, jsonl, csv, parquet), a folder or a shipped data set"
        yield Trouble(("data", "dataset_name"), "is required (or `data.datasets`)", hint, both)
    if given == 2:
        hint = "name one source, or list all of them under `data.datasets`"
        yield Trouble(("data", "datasets"), "and `data.dataset_name` are both given", hint, both)
    weights = [entry.weight is not None for entry in data.datasets or []]
    if data.datasets == []:
        yield Trouble(("data", "datasets"), "is an empty list", "give at least one entry")
    if any(weights) and not all(weights):
        first = weights.index(False)
        hint = "give a weight to every entry, or to none"
        yield Trouble(("data", "datasets", first), "has no weight, and others have one", hint)
    if data.test_split_size is not None and data.dataset_test_split is not None:
        yield Trouble(
            ("data", "test_split_size"),
            "and `data.dataset_test_split` are both given",
            "use a split of its own, or a share of the training rows",
            ("data.dataset_test_split",),
        )


def _evaluation(trainer: TrainerSection, data: DataSection) -> Iterator[Trouble]:
    held_out = data.test_split_size is not None or data.dataset_test_split is not None
    if trainer.eval_strategy != "no" and not held_out:
        yield Trouble(
            ("trainer", "eval_strategy"),
            "evaluates during training, and no rows are held out",
            "set `data.test_split_size` or `data.dataset_test_split`",
            ("data.test_split_size", "data.dataset_test_split"),
        )


def _trainer(trainer: TrainerSection) -> Iterator[Trouble]:
    schedule = ("trainer", "lr_scheduler_type")
    yield from _name(schedule, trainer.lr_scheduler_type, SCHEDULERS, "learning-rate schedule")
    yield from _name(("trainer", "optim"), trainer.optim, OPTIMIZERS, "optimizer")
    reports = [trainer.report_to] if isinstance(trainer.report_to, str) else trainer.report_to
    for tracker in reports:
        known = ("none", "all", *TRACKERS)
        yield from _name(("trainer", "report_to"), tracker, known, "tracker")
    if trainer.max_steps == 0 or trainer.max_steps < -1:
        message = f"is no number of steps: {trainer.max_steps}"
        yield Trouble(("trainer", "max_steps"), message, "give 1 or more, or -1 for whole epochs")
    if trainer.warmup_steps >= 1 and trainer.warmup_steps != int(trainer.warmup_steps):
        hint = "give whole steps, or a share of all steps below 1"
        yield Trouble(
            ("trainer", "warmup_steps"), f"is no number of steps: {trainer.warmup_steps}", hint
        )


def _dpo(config: Any) -> Iterator[Trouble]:
    losses = [config.loss_type] if isinstance(config.loss_type, str) else config.loss_type
    for loss in losses:
        yield from _name(("loss_type",), loss, DPO_LOSSES, "loss of DPO")
    yield from _name(("f_divergence_type",), config.f_divergence_type, F_DIVERGENCES, "divergence")
    weights = config.loss_weights
    if weights is not None and len(weights) != len(losses):
        message = f"has {len(weights)} weights for {len(losses)} losses"
        hint = "give one weight per entry of `loss_type`"
        yield Trouble(("loss_weights",), message, hint, ("loss_type",))
    if not losses:
        yield Trouble(("loss_type",), "is an empty list", "name at least one loss")
    if config.rpo_alpha and "sft" in losses:
        message = "adds the loss `sft`, and `loss_type` has it already"
        yield Trouble(("rpo_alpha",), message, "keep one of the two", ("loss_type",))
    odd = [loss for loss in losses if loss in DPO_LOSSES and loss not in F_DIVERGENCE_LOSSES]
    if config.f_divergence_type != "reverse_kl" and odd:
        message = f"has no form for the loss `{odd[0]}`"
        yield Trouble(("f_divergence_type",), message, "use `reverse_kl`", ("loss_type",))
    if "exo_pair" in losses and config.label_smoothing == 0:
        hint = "set it above 0; the EXO paper uses 1e-3"
        yield Trouble(("label_smoothing",), "must be above 0 with `exo_pair`", hint, ("loss_type",))
    if "robust" in losses and config.label_smoothing >= 0.5:
        hint = "it is the assumed share of flipped labels"
        yield Trouble(("label_smoothing",), "must be below 0.5 with `robust`", hint, ("loss_type",))


def _ppo(config: Any) -> Iterator[Trouble]:
    scorer, generation, lora = config.scorer, config.generation, config.lora
    if scorer.reward_model is None and not scorer.reward_funcs:
        hint = "give `scorer.reward_model`, `scorer.reward_funcs` or both"
        others = ("scorer.reward_funcs",)
        yield Trouble(("scorer", "reward_model"), "is required", hint, others)
    for name in scorer.reward_funcs:
        place = ("scorer", "reward_funcs", name)
        code = code_file(name)
        wrong = check_reward(name) if code is None else None
        if wrong is not None:
            yield Trouble(place, f"names no reward function or judge: `{name}`", wrong)
        if code is not None and not code[0].is_file():
            yield Trouble(place, f"names no file: `{code[0]}`", f"looked in {Path.cwd()}")
    for key, neutral in (("top_p", 1.0), ("top_k", 0)):
        if getattr(generation, key) != neutral:
            message = "makes draws that the log-probabilities know nothing of"
            yield Trouble(("generation", key), message, f"leave it at {neutral}")
    yield from _folding(config)
    if lora.use_peft and lora.lora_dropout:
        message = "makes a ratio of probabilities noise"
        yield Trouble(("lora", "lora_dropout"), message, "leave it at 0 for PPO")
    if config.trainer.eval_strategy != "no":
        message = "evaluates nothing in PPO, whose log shows every rollout"
        yield Trouble(("trainer", "eval_strategy"), message, "leave it out and use `align eval`")
    places: list[KeyPath] = []
    if config.trainer.extra.get("fp16"):
        places.append(("trainer", "extra", "fp16"))
    if config.model.dtype == "float16":
        places.append(("model", "dtype"))
    for key_path in places:
        message = "trains in float16, in which PPO's small gradients vanish: it scales no loss"
        yield Trouble(key_path, message, "use bfloat16 (`trainer.bf16`, `model.dtype`) or float32")
    per_rollout = (
        config.trainer.per_device_train_batch_size
        * config.trainer.gradient_accumulation_steps
        * config.num_mini_batches
        * config.launch.num_processes
    )
    if per_rollout % (generation.num_generations * config.launch.num_processes):
        message = f"does not divide the {per_rollout} episodes of a rollout"
        hint = "batch size x accumulation x num_mini_batches must be a multiple of it"
        yield Trouble(("generation", "num_generations"), message, hint)


def _folding(config: Any) -> Iterator[Trouble]:
    """An adapter that somebody wants folded into the weights has to be a plain sum with them."""
    if not (config.generation.fold_adapter and config.lora.use_peft):
        return
    others = {
        "lora.use_dora": config.lora.use_dora,
        "model.load_in_4bit": config.model.load_in_4bit,
        "model.load_in_8bit": config.model.load_in_8bit,
    }
    for other in [name for name, on in others.items() if on]:
        yield Trouble(
            ("generation", "fold_adapter"),
            f"folds the adapter into the weights, which `{other}` does not allow",
            "leave fold_adapter out",
            (other,),
        )


def _sample(config: Any) -> Iterator[Trouble]:
    scorer = config.scorer
    both = ("scorer.reward_model", "scorer.judge")
    hint = "give `scorer.reward_model` or `scorer.judge`"
    if scorer.reward_model is None and scorer.judge is None:
        yield Trouble(("scorer", "reward_model"), "is required (or `scorer.judge`)", hint, both)
    if scorer.reward_model is not None and scorer.judge is not None:
        message = "and `scorer.reward_model` are both given"
        yield Trouble(("scorer", "judge"), message, hint, both)
    yield from _registered(("scorer", "judge"), "judge", scorer.judge)
    yield from _registered(("pairs", "pair_rule"), "pair rule", config.pairs.pair_rule)
    if config.pairs.keep_best > config.generation.num_generations:
        message = f"keeps more than the {config.generation.num_generations} completions of a prompt"
        others = ("generation.num_generations",)
        yield Trouble(("pairs", "keep_best"), message, "lower it", others)


def _average(config: Any) -> Iterator[Trouble]:
    least = 1 if config.checkpoints else 2
    if len(config.models) < least:
        hint = "name another one, or set `checkpoints` to average those of one run"
        yield Trouble(("models",), "names too few models: an average takes two", hint)
    if len(config.models) == 1 and config.checkpoints == 1:
        yield Trouble(("checkpoints",), "takes one checkpoint of one run", "take two or more")
    for name in config.weights:
        yield from (
            Trouble(trouble.key, trouble.message, trouble.hint, ("models",))
            for trouble in _name(("weights", name), name, tuple(config.models), "entry of `models`")
        )
    if config.svd_rank is not None and config.method != "svd":
        message = f"is the rank of `svd`, and `method` is `{config.method}`"
        yield Trouble(("svd_rank",), message, "set `method: svd`", ("method",))


def _eval(config: Any) -> Iterator[Trouble]:
    if config.judge is None and config.reward_model is None:
        hint = "give `judge`, `reward_model` or both"
        others = ("judge", "reward_model")
        yield Trouble(("judge",), "is required (or `reward_model`)", hint, others)
    yield from _registered(("judge",), "judge", config.judge)
    for key in ("reference", "baseline"):
        value = getattr(config, key)
        if value is not None:
            names = tuple(config.models)
            yield from (
                Trouble(trouble.key, trouble.message, trouble.hint, ("models",))
                for trouble in _name((key,), value, names, "entry of `models`")
            )
    for name in config.best_of:
        yield from (
            Trouble(trouble.key, trouble.message, trouble.hint, ("models",))
            for trouble in _name(("best_of", name), name, tuple(config.models), "entry of `models`")
        )
    if config.best_of and config.reward_model is None:
        hint = "set `reward_model`: it picks the best"
        yield Trouble(("best_of",), "needs a reward model", hint, ("reward_model",))
