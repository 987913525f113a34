"""From a stage's typed config to the arguments of TRL's trainers: one pure function per trainer."""

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import torch
import trl

from align.config.sections import TrainerSection
from align.errors import AlignError, Problem
from align.stages.dpo import DPOConfig
from align.stages.reward import RewardConfig
from align.stages.sft import SFTConfig

OWNED = {
    "output_dir",
    "push_to_hub",
    "hub_token",
    "trust_remote_code",
    "resume_from_checkpoint",
    "model_init_kwargs",
}
"""Arguments that `extra` may not set, because align answers for what they do."""

Arguments = TypeVar("Arguments", trl.SFTConfig, trl.RewardConfig, trl.DPOConfig)


def _common(trainer: TrainerSection, checkpoints: Path) -> dict[str, Any]:
    """The arguments that every trainer takes from its section, and those align decides itself."""
    given = trainer.model_dump(exclude={"extra", "report_to", "bf16"})
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
    }


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
        elif key in given and key in TrainerSection.model_fields:
            problems.append(Problem("has a key of its own", where, f"set trainer.{key} instead"))
    if problems:
        raise AlignError(*problems)
    try:
        return kind(**{**given, **extra})
    except (TypeError, ValueError) as error:
        raise AlignError(Problem(str(error), "trainer")) from error


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
    """TRL's DPOConfig; rows are cut to length while they are rendered."""
    losses = [config.loss_type] if isinstance(config.loss_type, str) else config.loss_type
    given = _common(config.trainer, checkpoints) | {
        "beta": config.beta,
        "loss_type": losses,
        "loss_weights": config.loss_weights,
        "label_smoothing": config.label_smoothing,
        "f_divergence_type": config.f_divergence_type,
        "precompute_ref_log_probs": config.precompute_ref_log_probs,
        "max_length": None,
    }
    return build(trl.DPOConfig, given, config.trainer.extra)
