"""Loads policies and reward models: dtype, quantization, adapters, the identity of the base.

Nothing here runs code from a repository, and nothing but safetensors is read.
"""

from typing import Any, TypeAlias

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from align.config.sections import ModelSection
from align.errors import fail
from align.models.identity import (
    Artifact,
    check_base,
    look_at,
    require_adapter,
    require_full_model,
    require_reward_model,
)
from align.models.tokenizer import load_tokenizer

Model: TypeAlias = PreTrainedModel | PeftModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str, checkpoint: str | None, *, trained: bool) -> torch.dtype:
    """The type that weights are loaded in.

    `auto` means float32 for weights that are trained (bfloat16 updates below 1/256 of a weight
    would vanish), else the checkpoint's own type; float16 becomes float32 where there is no GPU,
    because CPUs emulate it.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    if trained:
        return torch.float32
    kept = DTYPES.get(checkpoint or "float32", torch.float32)
    if kept is torch.float16 and not torch.cuda.is_available():
        return torch.float32
    return kept


def quantization(model: ModelSection) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings of a model section; None for unquantized weights."""
    if model.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model.load_in_8bit else None


def load_arguments(model: ModelSection, checkpoint: Artifact, *, trained: bool) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for the base of a stage."""
    config = checkpoint.config or {}
    arguments: dict[str, Any] = {
        "revision": model.model_revision,
        "dtype": resolve_dtype(
            model.dtype, config.get("dtype") or config.get("torch_dtype"), trained=trained
        ),
        "attn_implementation": model.attn_implementation,
        "quantization_config": quantization(model),
        "use_safetensors": True,
        # A repository may bring code beside an architecture that transformers has.
        "trust_remote_code": False,
    }
    if arguments["quantization_config"] is not None and torch.cuda.is_available():
        # A quantized model cannot be moved later, so it is loaded where it will stay.
        arguments["device_map"] = {"": torch.cuda.current_device()}
    return {key: value for key, value in arguments.items() if value is not None}


def _from_pretrained(loader: Any, path: str, arguments: dict[str, Any]) -> PreTrainedModel:
    verbosity = transformers_logging.get_verbosity()
    # A fresh score head and an unused language head are meant; the load report calls them problems.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        loaded: PreTrainedModel = loader.from_pretrained(path, **arguments)
    except OSError as error:
        if "safetensors" in str(error):
            fail(
                "holds no safetensors weights, and align reads no pickle files",
                where=path,
                hint="convert the checkpoint once with save_pretrained(safe_serialization=True)",
            )
        fail(f"cannot be loaded: {str(error).splitlines()[0]}", where=path)
    except (ImportError, ValueError) as error:
        # A library that is asked for and missing (flash-attn, bitsandbytes), or no such setting.
        fail(f"cannot be loaded: {str(error).strip().splitlines()[0]}", where=path)
    finally:
        transformers_logging.set_verbosity(verbosity)
    silence_routers(loaded)
    if hasattr(loaded.config, "auto_map"):  # names code that no artifact brings along
        del loaded.config.auto_map
    return loaded


def silence_routers(model: Model) -> None:
    """Let a model with experts give its routers' logits only where a call asks for them.

    With `output_router_logits` in its config (which TRL sets for its load-balancing loss) transformers computes that
    loss in every forward pass, and fails over a key-value cache with a mask.
    """
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


def _attach(base: PreTrainedModel, adapter: str, base_path: str, *, trainable: bool) -> PeftModel:
    check_base(adapter, base_path, base.config.to_dict())
    attached: PeftModel = PeftModel.from_pretrained(
        base, adapter, is_trainable=trainable, autocast_adapter_dtype=trainable
    )
    return attached


def check_model(model: ModelSection) -> Artifact:
    """Refuse what is no full model, and what is no adapter where one is named. Reads no weights.

    For the beginning of a stage: before rows are turned into tokens, which may take long.
    """
    found = require_full_model(
        model.model_name_or_path, model.model_revision, key="model_name_or_path"
    )
    if model.adapter_name_or_path is not None:
        require_adapter(model.adapter_name_or_path, key="adapter_name_or_path")
    return found


def load_policy(model: ModelSection, *, trained: bool = False, train_base: bool = False) -> Model:
    """The language model that a stage starts from, with the adapter the section names.

    Args:
        model: the stage's model section.
        trained: the stage trains it. An adapter in mode `continue` is then trainable.
        train_base: every weight is trained (no LoRA), so `dtype: auto` means float32.

    Returns:
        A full model. An adapter is folded into its weights (mode `stack`: what is trained comes on
        top, and the reference of DPO is exactly this model), or stays an adapter of a PeftModel
        (mode `continue`, and on a quantized base that is only read).
    """
    checkpoint = check_model(model)
    arguments = load_arguments(model, checkpoint, trained=train_base)
    base = _from_pretrained(AutoModelForCausalLM, model.model_name_or_path, arguments)
    adapter = model.adapter_name_or_path
    if adapter is None:
        return base
    quantized = model.load_in_4bit or model.load_in_8bit
    if model.adapter_mode == "continue" or (quantized and not trained):
        return _attach(base, adapter, model.model_name_or_path, trainable=trained)
    if quantized:
        fail(
            "adapter_mode `stack` would round the old adapter into quantized weights",
            where=f"adapter_name_or_path: {adapter}",
            hint="use adapter_mode: continue, or load the base unquantized",
        )
    return _attach(base, adapter, model.model_name_or_path, trainable=False).merge_and_unload()


def load_dequantized_policy(model: ModelSection) -> PeftModel:
    """An adapter on the numbers that its quantized base stood for, in float32.

    These are what the adapter was trained on; on the weights before quantization it would be another model. The base
    is loaded for it: after a forward pass on a CPU, bitsandbytes holds 4-bit weights in an order of their own.
    """
    assert model.adapter_name_or_path is not None
    plain = model.model_copy(update={"adapter_name_or_path": None})
    base: Any = load_policy(plain)
    base = base.dequantize(dtype=torch.float32).float()
    return _attach(base, model.adapter_name_or_path, model.model_name_or_path, trainable=False)


def check_vocabulary(model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids beyond the embedding: on a GPU these end in a device-side assert."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        fail(
            f"has {len(tokenizer)} tokens, but the model's embedding has {rows} rows",
            where=f"tokenizer {tokenizer.name_or_path}",
            hint="use the tokenizer that belongs to the model",
        )


def inference_device() -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _placed(model: Model, device: torch.device | None = None) -> Model:
    model.eval()
    quantized = getattr(model, "is_quantized", False)
    return model if quantized else model.to(device or inference_device())


def _adapter_parts(found: Artifact) -> tuple[str, str]:
    if found.base is None:
        fail("names no base model in adapter_config.json", where=found.path)
    return found.base, found.base_revision or "main"


def policy_section(path: str, **values: Any) -> ModelSection:
    """The model section of a full model or an adapter (its base is found in adapter_config.json).

    Args:
        path: folder or Hub id.
        **values: further keys, such as `load_in_4bit`.

    Raises:
        AlignError: no model there, or a reward model.
    """
    found = look_at(path)
    if found.kind in ("reward", "reward_adapter"):
        require_full_model(path, key="model")
    if found.kind != "adapter":
        return ModelSection(model_name_or_path=path, **values)
    base, revision = _adapter_parts(found)
    return ModelSection(
        model_name_or_path=base,
        model_revision=revision,
        adapter_name_or_path=path,
        adapter_mode="continue",
        **values,
    )


def load_any_policy(path: str, **values: Any) -> tuple[Model, PreTrainedTokenizerBase]:
    """A policy, ready to write, from what `policy_section` takes; the arguments are the same."""
    section = policy_section(path, **values)
    return load_placed(section), load_tokenizer(section)


def load_placed(section: ModelSection) -> Model:
    """A policy in evaluation mode, on this process's device."""
    return _placed(load_policy(section))


def load_reward_base(
    model: ModelSection, checkpoint: Artifact, *, train_base: bool
) -> PreTrainedModel:
    """A sequence classifier with one label over the weights of a language model, dropout off.

    The score head starts at a normal distribution with deviation 1/sqrt(hidden + 1) (Tulu 3), so
    that first rewards have a spread of about one. The caller seeds the generator.
    """
    arguments = load_arguments(model, checkpoint, trained=train_base)
    if checkpoint.kind == "reward" and (labels := _labels(checkpoint)) != 1:
        fail(f"has {labels} labels; a reward model has one", where=checkpoint.path)
    arguments["num_labels"] = 1
    loaded = _from_pretrained(
        AutoModelForSequenceClassification, model.model_name_or_path, arguments
    )
    if checkpoint.kind != "reward":
        head = loaded.score.weight
        with torch.no_grad():
            head.normal_(std=(head.shape[1] + 1) ** -0.5)
    return loaded


def _labels(checkpoint: Artifact) -> int:
    """Labels of a classifier; transformers leaves out what equals its default of two."""
    return len((checkpoint.config or {}).get("id2label") or "01")


def load_reward_start(model: ModelSection, *, train_base: bool) -> Model:
    """What the reward stage trains: a classifier over a language model, or a reward model again.

    An adapter in mode `stack` is a policy's and is folded into the backbone; in mode `continue`
    it is a reward model's and goes on being trained.
    """
    path, adapter = model.model_name_or_path, model.adapter_name_or_path
    checkpoint = look_at(path, model.model_revision)
    if checkpoint.kind != "reward":
        checkpoint = require_full_model(path, model.model_revision, key="model_name_or_path")
    classifier = load_reward_base(model, checkpoint, train_base=train_base)
    if adapter is None:
        return classifier
    if model.adapter_mode == "stack":
        policy = load_policy(model, trained=True, train_base=train_base)
        prefix = classifier.base_model_prefix
        getattr(classifier, prefix).load_state_dict(getattr(policy, prefix).state_dict())
        return classifier
    if look_at(adapter).kind != "reward_adapter":
        fail(
            "is no reward model's adapter, so it cannot be trained further as one",
            where=f"adapter_name_or_path: {adapter}",
            hint="use adapter_mode: stack to start from a policy's adapter",
        )
    return _attach(classifier, adapter, path, trainable=True)


WEIGHTS = {
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
}


def _with_weights_of(like: ModelSection | None, **given: str) -> ModelSection:
    return ModelSection.model_validate(
        {**(like.model_dump(include=WEIGHTS) if like else {}), **given}
    )


def load_reward_model(
    path: str, like: ModelSection | None = None, *, device: torch.device | None = None
) -> tuple[Model, PreTrainedTokenizerBase]:
    """A trained reward model: an adapter with its score head, or a full sequence classifier.

    `like` gives the type and quantization of the base, as the stage that trained it had them; `device` is this
    process's GPU where it is not said.
    """
    found = require_reward_model(path)
    if found.kind == "reward":
        section = _with_weights_of(like, model_name_or_path=path)
        model: Model = load_reward_base(section, found, train_base=False)
    else:
        base, revision = _adapter_parts(found)
        section = _with_weights_of(
            like, model_name_or_path=base, model_revision=revision, tokenizer_name_or_path=path
        )
        model = _attach(
            load_reward_base(section, look_at(base, revision), train_base=False),
            path,
            base,
            trainable=False,
        )
    tokenizer = load_tokenizer(section)
    model.config.pad_token_id = tokenizer.pad_token_id
    return _placed(model, device), tokenizer
