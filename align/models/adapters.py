"""LoRA adapters: what is trained, how an artifact is saved, and how two adapters become one."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.config.sections import LoraSection, ModelSection
from align.errors import fail
from align.models.identity import require_adapter
from align.models.tokenizer import control_token_ids


def lora_config(
    lora: LoraSection,
    *,
    reward: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: PreTrainedModel | PeftModel | None = None,
) -> LoraConfig | None:
    """PEFT's settings of a LoRA section; None when every parameter is trained.

    The task type is the stage's affair and never the user's: a reward model is a sequence
    classifier whose score head is trained and saved with the adapter.
    """
    if not lora.use_peft:
        return None
    tokens: Any = lora.trainable_token_indices
    if tokens == "control":
        if tokenizer is None:
            fail("`control` needs the stage's tokenizer", where="lora.trainable_token_indices")
        tokens = control_token_ids(tokenizer)
    if tokens and model is not None and _has_own_head(model):
        # The rows of an untied head write these tokens; trained inputs alone would only read them.
        head = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is head)
        tokens = {"embed_tokens": tokens, name.rpartition(".")[2]: tokens}
    saved = list(lora.lora_modules_to_save or [])
    if reward and "score" not in saved:
        saved.append("score")
    config = LoraConfig(
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
    if model is not None:
        _check_experts(config, model)
    return config


def _check_experts(config: LoraConfig, model: PreTrainedModel | PeftModel) -> None:
    """Refuse what PEFT cannot do on experts, which transformers 5 holds as stacks of weights and not as layers."""
    found = deepcopy(config)
    try:
        convert_peft_config_for_transformers(found, model, get_model_conversion_mapping(model))
    except ValueError as error:
        fail(
            str(error),
            where="lora.lora_target_modules",
            hint="name the projections of an expert together, or take `all-linear`",
        )
    for key, value in (("lora_dropout", found.lora_dropout), ("use_dora", found.use_dora)):
        if value and found.target_parameters:
            fail(
                "the adapted experts are stacks of weights, on which PEFT has neither dropout nor DoRA",
                where=f"lora.{key}: {str(value).lower()}",
                hint=f"leave {key} out, or adapt the attention alone with lora.lora_target_modules",
            )


def _has_own_head(model: PreTrainedModel | PeftModel) -> bool:
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is not inputs.weight


def copy_reference(model: PreTrainedModel | PeftModel) -> None:
    """Finish TRL's frozen copy `ref` of a continued adapter.

    TRL copies weights with `.default.` in their names; those that end in `.default` (trained token
    rows, adapters of embeddings) would keep what they had at their start. On a quantized base TRL casts the trained
    adapter alone to bfloat16, and a reference in float32 would round otherwise than the policy.
    """
    if not isinstance(model, PeftModel) or "ref" not in model.peft_config:
        return
    for name, weight in model.named_parameters():
        if name.endswith(".default"):
            with torch.no_grad():
                model.get_parameter(name.removesuffix("default") + "ref").copy_(weight)
    types = {name: weight.dtype for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        own = types.get(name.replace(".ref.", ".default."))
        if ".ref." in name and own is not None:
            weight.data = weight.data.to(own)


def restore_saved_types(model: PeftModel) -> None:
    """Give modules that are trained whole (a score head, embeddings) the type of the module they stand for.

    TRL casts all that is trained over a quantized base to bfloat16; a head in bfloat16 cannot read hidden states in
    float32.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            own = next(module.original_module.parameters()).dtype
            module.modules_to_save.to(own)


def expose_trained_head(model: PreTrainedModel | PeftModel) -> None:
    """Let fused losses read the output head when its rows are trained through tied embeddings.

    PEFT wraps such a head and answers `weight` with the trained rows in place, but has no `bias`,
    which TRL's fused head asks for.
    """
    if not isinstance(model, PeftModel):
        return
    head = model.get_base_model().get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        head.bias = None


def save_adapter(
    model: PeftModel,
    folder: Path,
    *,
    base: str,
    revision: str | None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save the trained adapter alone, with the base it belongs to written as the user named it.

    Args:
        weights: of a sharded model, brought together; else the model's own are taken.
    """
    model.save_pretrained(
        folder, selected_adapters=["default"], safe_serialization=True, state_dict=weights
    )
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
OWN_UNJOINABLE = ("use_dora", "lora_modules_to_save", "trainable_token_indices")


def check_joinable(section: ModelSection, lora: LoraSection, *, merge_adapter: bool) -> None:
    """Refuse, before anything is trained, a stacked adapter that could not be saved with the new one.

    One adapter can hold the sum of two only where both are plain LoRA over named modules.
    """
    old = section.adapter_name_or_path
    joined = old and section.adapter_mode == "stack" and lora.use_peft and not merge_adapter
    if not joined:
        return
    assert old is not None
    config = require_adapter(old, key="adapter_name_or_path").config or {}
    found = [key for key in UNJOINABLE if config.get(key)]
    new = [key for key in OWN_UNJOINABLE if getattr(lora, key)]
    if found or new:
        both = [f"the old one has `{key}`" for key in found]
        both += [f"the new one has `{key}`" for key in new]
        fail(
            f"cannot be joined with a new adapter into one: {', '.join(both)}",
            where=f"model.adapter_name_or_path: {old}",
            hint="set merge_adapter: true, which writes a full model",
        )


def join_adapters(base: PreTrainedModel, first: str, second: str, folder: Path) -> None:
    """Write one adapter over `base` that equals `first` and `second` put on it together.

    Concatenating the factors adds the products, so the joined rank is the sum of both ranks.
    """
    model = PeftModel.from_pretrained(base, first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    if any(model.peft_config[name].target_parameters for name in ("first", "second")):
        _add_joined(model)
    else:
        model.add_weighted_adapter(
            ["first", "second"], [1.0, 1.0], adapter_name="default", combination_type="cat"
        )
    model.save_pretrained(folder, selected_adapters=["default"], safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)


def _add_joined(model: PeftModel) -> None:
    """Add the adapter `default`, the sum of `first` and `second`, where experts are adapted too: PEFT joins linear
    layers only. A layer with a smaller rank than the joined one has zeros in the rest."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    one, two = (model.peft_config[name] for name in ("first", "second"))
    joined = deepcopy(two)
    joined.r = max(sum(layer.r.get(name, 0) for name in ("first", "second")) for layer in layers)
    joined.lora_alpha, joined.use_rslora = joined.r, False
    joined.rank_pattern, joined.alpha_pattern = {}, {}
    joined.target_modules = set(one.target_modules) | set(two.target_modules)
    joined.target_parameters = {*(one.target_parameters or ()), *(two.target_parameters or ())}
    model.add_adapter("default", joined)
    for layer in layers:
        if "default" in layer.lora_A:
            with torch.no_grad():
                _fill_joined(layer)


def _fill_joined(layer: Any) -> None:
    """Copy the factors of both adapters into those of `default`.

    PEFT lays out a stack of E experts as A [E r, in] with the expert in front of the rank, and B [out, r E] with the
    rank in front of the expert; a linear layer is E = 1.
    """
    experts = getattr(layer, "num_experts", 1)

    def factors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts)

    a, b = factors("default")
    a.zero_()
    b.zero_()
    start = 0
    for name in ("first", "second"):
        if name in layer.lora_A:
            own_a, own_b = factors(name)
            end = start + own_a.shape[1]
            a[:, start:end] = own_a
            b[:, start:end] = own_b * (layer.scaling[name] / layer.scaling["default"])
            start = end
