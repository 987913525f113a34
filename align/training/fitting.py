"""What the three training stages share: fit with resume, then save an artifact that loads."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from align.config.sections import ModelSection
from align.models.adapters import join_adapters, name_base, restore_saved_types, save_adapter
from align.models.identity import write_base_identity
from align.models.loading import load_policy, silence_routers
from align.models.quick_lora import quicken
from align.models.tokenizer import end_of_turn_ids
from align.runs import RunFolder
from align.training.callbacks import SignalCallback, training_callbacks
from align.training.checkpoints import keep_weights, newest_complete_checkpoint
from align.training.sharding import (
    gathered,
    in_float32,
    is_sharded,
    parameter_counts,
    parameters_held,
)

Model: TypeAlias = PreTrainedModel | PeftModel


def fit(trainer: Trainer, folder: RunFolder) -> dict[str, float]:
    """Train from the newest complete checkpoint of the run folder, or from the start.

    Returns:
        The trainer's closing metrics; they are also noted in the run folder.
    """
    if isinstance(trainer.model, PeftModel):
        quicken(trainer.model)
        if getattr(trainer.model, "is_quantized", False):
            restore_saved_types(trainer.model)
    if is_sharded(trainer):
        in_float32(trainer.model)
    callbacks = training_callbacks(folder, trainer)
    for callback in callbacks:
        trainer.add_callback(callback)
    checkpoint = newest_complete_checkpoint(folder.checkpoints)
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        for callback in callbacks:
            if isinstance(callback, SignalCallback):
                callback.restore()
    metrics = {key.removeprefix("train_"): value for key, value in result.metrics.items()}
    folder.note("loss", metrics.get("loss"))
    folder.note("steps", trainer.state.global_step)
    folder.note("tokens", int(getattr(trainer, "_total_train_tokens", 0)))
    total, trained = parameter_counts(trainer.model)
    folder.note("parameters", total)
    folder.note("trainable_parameters", trained)
    if is_sharded(trainer):
        folder.note("parameters_per_process", parameters_held(trainer.model))
    return metrics


def generation_config(model: Model, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Generation settings that end on every id that ends an assistant turn.

    A base model's own settings end on `<|end_of_text|>` alone, while its turns end in
    `<|eot_id|>`: a chat model saved with them would never stop.
    """
    config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_of_turn_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config = config
    return config


def save_policy(
    trainer: Trainer,
    folder: RunFolder,
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    merge_adapter: bool,
) -> None:
    """Write the trained policy into the artifact folder: an adapter, or a full model.

    Every rank calls it; the main one writes. The tokenizer, its chat template and the generation
    settings go with the weights.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "policy", model)  # PPO trains a policy among other roles
    generation = generation_config(model, tokenizer)
    weights = gathered(trainer) if is_sharded(trainer) else None
    if not folder.is_main:
        return
    keep_checkpoints(trainer, folder, section)
    artifact = folder.artifact
    if isinstance(model, PeftModel) and not merge_adapter:
        _save_as_adapter(model, section, artifact, weights)
    else:
        full = model
        if isinstance(model, PeftModel):
            full = merged(model, load_policy, section, weights)
            weights = None
        silence_routers(full)
        full.save_pretrained(artifact, safe_serialization=True, state_dict=weights)
        _drop_base_path(artifact)
    generation.save_pretrained(artifact)
    tokenizer.save_pretrained(artifact)


def keep_checkpoints(trainer: Trainer, folder: RunFolder, section: ModelSection) -> None:
    """Leave the weights of the last checkpoints in the run, where the recipe asks for them (`align average`).

    Adapters among them name their base, as the artifact does.
    """
    config = folder.config.model_dump(include={"trainer"})
    number = config["trainer"]["keep_checkpoints"]
    if number is None or not folder.is_main:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    base, revision = section.model_name_or_path, section.model_revision
    for kept in keep_weights(folder.checkpoints, folder.path, number):
        if (kept / "adapter_config.json").is_file():
            name_base(kept, base=base, revision=revision)
            write_base_identity(kept, base, model.config.to_dict())
        _drop_base_path(kept)


def merged(
    model: PeftModel,
    load: Callable[..., Model],
    section: ModelSection,
    weights: dict[str, Tensor] | None,
) -> PreTrainedModel:
    """The trained adapter folded into its base.

    Args:
        load: loads what the stage started from, given a model section.
        weights: of a sharded model, brought together. Its base is in pieces, so it is loaded again.
    """
    if weights is None:
        # TRL's frozen copy of a continued adapter; PPO's other roles.
        for name in set(model.peft_config) - {"default"}:
            model.delete_adapter(name)
        full: PreTrainedModel = model.merge_and_unload()
        return full
    if section.continues_adapter:
        section = section.model_copy(update={"adapter_name_or_path": None})
    with TemporaryDirectory() as place:
        base, revision = section.model_name_or_path, section.model_revision
        save_adapter(model, Path(place), base=base, revision=revision, weights=weights)
        again = PeftModel.from_pretrained(load(section), place)
        found: PreTrainedModel = again.merge_and_unload()
    return found


def _save_as_adapter(
    model: PeftModel, section: ModelSection, artifact: Path, weights: dict[str, Tensor] | None
) -> None:
    base, revision = section.model_name_or_path, section.model_revision
    old = section.adapter_name_or_path
    if old is None or section.adapter_mode == "continue":
        save_adapter(model, artifact, base=base, revision=revision, weights=weights)
    else:
        # Trained on base + old adapter: alone, the new one would sit on the wrong weights.
        with TemporaryDirectory(dir=artifact.parent) as new:
            save_adapter(model, Path(new), base=base, revision=revision, weights=weights)
            plain = section.model_copy(update={"adapter_name_or_path": None})
            join_adapters(load_policy(plain), old, new, artifact)
        name_base(artifact, base=base, revision=revision)
    write_base_identity(artifact, base, model.config.to_dict())


def _drop_base_path(artifact: Path) -> None:
    """A saved config needs no `_name_or_path`: it would hold a path of this machine."""
    file = artifact / "config.json"
    if file.is_file():
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
