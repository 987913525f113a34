"""LoRA adapters: what is trained, how an artifact is saved, and how two adapters become one."""

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.config.sections import LoraSection
from align.errors import fail
from align.models.tokenizer import control_token_ids


def lora_config(
    lora: LoraSection,
    *,
    reward: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> LoraConfig | None:
    """PEFT's settings of a LoRA section; None when every parameter is trained.

    The task type is the stage's affair and never the user's: a reward model is a sequence
    classifier whose score head is trained and saved with the adapter.
    """
    if not lora.use_peft:
        return None
    tokens = lora.trainable_token_indices
    if tokens == "control":
        if tokenizer is None:
            fail("`control` needs the stage's tokenizer", where="lora.trainable_token_indices")
        tokens = control_token_ids(tokenizer)
    saved = list(lora.lora_modules_to_save or [])
    if reward and "score" not in saved:
        saved.append("score")
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules,
        modules_to_save=saved or None,
        trainable_token_indices=tokens,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        bias="none",
        task_type=TaskType.SEQ_CLS if reward else TaskType.CAUSAL_LM,
    )


def expose_tied_head(model: PreTrainedModel | PeftModel) -> None:
    """Let fused losses read the output head when its rows are trained through tied embeddings.

    PEFT wraps such a head and answers `weight` with the trained rows in place, but has no `bias`,
    which TRL's fused head asks for.
    """
    if not isinstance(model, PeftModel):
        return
    head = model.get_base_model().get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        head.bias = None


def save_adapter(model: PeftModel, folder: Path, *, base: str, revision: str | None) -> None:
    """Save the trained adapter alone, with the base it belongs to written as the user named it."""
    model.save_pretrained(folder, selected_adapters=["default"], safe_serialization=True)
    # PEFT's card is an empty template; a card is written where one is asked for.
    (folder / "README.md").unlink(missing_ok=True)
    name_base(folder, base=base, revision=revision)


def name_base(folder: Path, *, base: str, revision: str | None) -> None:
    """Write into an adapter's config which base it belongs to."""
    file = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    config["revision"] = revision
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


UNJOINABLE = ("use_dora", "modules_to_save", "trainable_token_indices")


def require_joinable(adapter: str) -> None:
    """Refuse an adapter that is more than plain LoRA, and so cannot be joined with another."""
    config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    for key in UNJOINABLE:
        if config.get(key):
            fail(
                f"has `{key}`, so no single adapter can hold it and a new one",
                where=adapter,
                hint="set merge_adapter: true, which writes a full model",
            )


def join_adapters(base: PreTrainedModel, first: str, second: str, folder: Path) -> None:
    """Write one adapter over `base` that equals `first` and `second` put on it together.

    Concatenating the factors adds the products, so the joined rank is the sum of both ranks.
    """
    for adapter in (first, second):
        require_joinable(adapter)
    model = PeftModel.from_pretrained(base, first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    model.add_weighted_adapter(
        ["first", "second"], [1.0, 1.0], adapter_name="default", combination_type="cat"
    )
    model.save_pretrained(folder, selected_adapters=["default"], safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
