"""From a stage's typed config to the arguments of TRL's trainers: one pure function per trainer."""

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import torch
import trl
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.config.sections import TrainerSection
from align.config.sharding import sharding_in_force
from align.errors import AlignError, Problem, fail
from align.stages.dpo import DPOConfig
from align.stages.ppo import PPOConfig
from align.stages.reward import RewardConfig
from align.stages.sft import SFTConfig

OWNED = {
    "output_dir",
    "push_to_hub",
    "hub_token",
    "trust_remote_code",
    "resume_from_checkpoint",
    "model_init_kwargs",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "accelerator_config",
    "parallelism_config",
}
"""Arguments that `extra` may not set, because align answers for what they do."""

ROWS = {
    "dataset_text_field",
    "dataset_kwargs",
    "dataset_num_proc",
    "chat_template_path",
    "eos_token",
    "pad_token",
    "max_length",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "eval_packing",
}
"""Arguments of TRL's own preparation of rows, which reads nothing here: rows are token ids already."""

Arguments = TypeVar("Arguments", trl.SFTConfig, trl.RewardConfig, trl.DPOConfig, TrainingArguments)


def _common(trainer: TrainerSection, checkpoints: Path) -> dict[str, Any]:
    """The arguments that every trainer takes from its section, and those align decides itself."""
    given = trainer.model_dump(exclude={"extra", "report_to", "bf16", "keep_checkpoints"})
    cuda = torch.cuda.is_available()
    bf16 = trainer.bf16
    if bf16 is None:
        bf16 = cuda and torch.cuda.is_bf16_supported()
    report_to = [trainer.report_to] if isinstance(trainer.report_to, str) else trainer.report_to
    return given | {
        "output_dir": str(checkpoints),
        "report_to": report_to,
        "bf16": bf16,
        "use_cpu": not cuda,
        "save_strategy": "steps",
        "disable_tqdm": True,
        # A NaN that is filtered out of the log would be trained on and saved without a word.
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "dataloader_pin_memory": cuda,
        "push_to_hub": False,
        **_sharded(cuda=cuda),
    }


def _sharded(*, cuda: bool) -> dict[str, Any]:
    """What sharded weights ask for. On CPUs accelerate turns sharding off where it is told of them."""
    sharding = sharding_in_force()
    if sharding is None:
        return {}
    if sharding.way == "FSDP":
        # Else every process keeps whole gradients from one micro-batch of a step to the next.
        config: dict[str, Any] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        if not cuda:
            config["use_configured_state"] = True  # the one that `align.launch` made
        return {"accelerator_config": config}
    return {} if cuda else {"use_cpu": False, "ddp_backend": "gloo"}


def build(kind: type[Arguments], given: dict[str, Any], extra: dict[str, Any]) -> Arguments:
    """TRL's config from our arguments and the recipe's `extra`, whose keys it must know.

    Raises:
        AlignError: with one problem per key of `extra` that is unknown, ours, or set twice.
    """
    known = {field.name for field in fields(kind)}
    problems = []
    for key in extra:
        where = f"trainer.extra.{key}"
        if key in OWNED:
            problems.append(Problem("is decided by align", where, "leave it out"))
        elif key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else None
            problems.append(Problem(f"{kind.__name__} has no such argument", where, hint))
        elif key in given or key in ROWS:
            own = key in TrainerSection.model_fields
            hint = (
                f"set trainer.{key} instead" if own else f"set `{key}` of the recipe, if it has it"
            )
            problems.append(Problem("is set by align from other keys", where, hint))
    if problems:
        raise AlignError(*problems)
    try:
        found = kind(**{**given, **extra})
    except (TypeError, ValueError) as error:
        raise AlignError(Problem(str(error), "trainer")) from error
    # DeepSpeed would have each weight taken apart as it is loaded, and adapters could not be folded in, nor heads made.
    unset_hf_deepspeed_config()
    if found.n_gpu > 1:
        # A process trains on one GPU, as the recipe counts rows; the Trainer would take all it sees (nn.DataParallel).
        found._n_gpu = 1
    return found


def sft_arguments(config: SFTConfig, checkpoints: Path) -> trl.SFTConfig:
    """TRL's SFTConfig; the rows are token ids and labels already, so only packing needs lengths."""
    given = _common(config.trainer, checkpoints) | {
        "packing": config.data.packing,
        "max_length": config.data.max_length,
    }
    return build(trl.SFTConfig, given, config.trainer.extra)


def reward_arguments(config: RewardConfig, checkpoints: Path) -> trl.RewardConfig:
    """TRL's RewardConfig; rows are cut to length while they are rendered."""
    given = _common(config.trainer, checkpoints) | {
        "center_rewards_coefficient": config.center_rewards_coefficient,
        "max_length": None,
    }
    return build(trl.RewardConfig, given, config.trainer.extra)


def dpo_arguments(config: DPOConfig, checkpoints: Path) -> trl.DPOConfig:
    """TRL's DPOConfig; rows are cut to length while they are rendered.

    `rpo_alpha` becomes TRL's loss `sft` with that weight beside the others: the mean over all
    chosen tokens of the batch of -log p (arXiv 2404.19733, eq. 1, with a batch's mean length).
    A router's load-balancing loss is added only where `extra` asks for it (`router_aux_loss_coef`): the
    architecture's own weight is for pretraining, and TRL would add it to the preference loss.
    """
    losses = [config.loss_type] if isinstance(config.loss_type, str) else list(config.loss_type)
    weights = config.loss_weights
    if config.rpo_alpha:
        weights = [*(weights or [1.0] * len(losses)), config.rpo_alpha]
        losses = [*losses, "sft"]
    given = _common(config.trainer, checkpoints) | {
        "beta": config.beta,
        "loss_type": losses,
        "loss_weights": weights,
        "label_smoothing": config.label_smoothing,
        "f_divergence_type": config.f_divergence_type,
        "precompute_ref_log_probs": config.precompute_ref_log_probs,
        "max_length": None,
    }
    extra = {"router_aux_loss_coef": 0.0, **config.trainer.extra}
    return build(trl.DPOConfig, given, extra)


def ppo_arguments(config: PPOConfig, checkpoints: Path) -> TrainingArguments:
    """transformers' TrainingArguments; what is PPO's own goes from the config to the trainer."""
    found = build(TrainingArguments, _common(config.trainer, checkpoints), config.trainer.extra)
    if found.mixed_precision == "fp16":
        fail(
            "trains in float16, in which PPO's small gradients vanish: it scales no loss",
            where="trainer.extra.fp16" if found.fp16 else "launch.accelerate: mixed_precision",
            hint="use bfloat16 (trainer.bf16) or float32",
        )
    return found
