"""The sections that stages share. Each knob is one field: its type, bound, default and one sentence.

The recipe, the command-line flag, `--options`, the JSON schema and the docs all read these fields, so a knob is
written once. Leaf names are TRL's and transformers' own. No field here may import torch.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A group of knobs. Unknown keys are errors; values never change after validation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        defer_build=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class ModelSection(Section):
    """Which weights and tokenizer the stage starts from."""

    model_name_or_path: str
    """Hub id or folder of a full model (an adapter folder goes into `adapter_name_or_path`)."""
    model_revision: str = "main"
    """Branch, tag or commit of the Hub model."""
    adapter_name_or_path: str | None = None
    """LoRA adapter folder or Hub id that is put on the model before the stage starts."""
    adapter_mode: Literal["stack", "continue"] = "stack"
    """Train something new on top of that adapter (`stack`), or go on training it (`continue`)."""
    tokenizer_name_or_path: str | None = None
    """Hub id or folder of the tokenizer; the model's own when unset."""
    chat_template_path: str | None = None
    """A Jinja file, or a shipped template (`llama3`, `llama3.1`, `llama3.2`), in place of the tokenizer's own."""
    chat_template: str | None = None
    """The same as Jinja text."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the loaded weights; `auto` is the checkpoint's for frozen weights and float32 for trained ones."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, ...; transformers' own choice when unset."""
    load_in_4bit: bool = False
    """Quantize the frozen base to 4 bits with bitsandbytes (QLoRA)."""
    load_in_8bit: bool = False
    """Quantize the frozen base to 8 bits with bitsandbytes."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit number format."""
    use_bnb_nested_quant: bool = True
    """Quantize the quantization constants too (double quantization)."""

    @property
    def continues_adapter(self) -> bool:
        """Whether the stage goes on training an adapter instead of making a new one."""
        return self.adapter_name_or_path is not None and self.adapter_mode == "continue"


class LoraSection(Section):
    """Which parameters are trained."""

    use_peft: bool = True
    """Train a LoRA adapter; `false` trains every parameter."""
    lora_r: PositiveInt = 16
    """Rank of the adapter."""
    lora_alpha: PositiveInt = 32
    """Scale: the adapter's product is multiplied by alpha / r (alpha / sqrt(r) with rsLoRA)."""
    lora_dropout: Probability = 0.0
    """Dropout in front of the adapter."""
    lora_target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: `all-linear`, a name pattern, or a list of names."""
    lora_modules_to_save: list[str] | None = None
    """Modules trained and saved in full beside the adapter (a reward model adds its score head itself)."""
    trainable_token_indices: Literal["control"] | list[int] | None = None
    """Embedding rows trained beside the adapter; `control` names every control token of the chat template."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353)."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""


class DatasetEntry(Section):
    """One source of a mixture."""

    path: str
    """Hub id, file (json, jsonl, csv, parquet, arrow), folder of such files, or the name of a shipped data card."""
    name: str | None = None
    """Configuration of a Hub data set."""
    split: str = "train"
    """Split, with slicing: `train`, `train[:1%]`; for a folder or card the file of that name."""
    weight: PositiveFloat | None = None
    """Share of the mixture, relative to the other entries; give it to all entries or to none."""
    columns: dict[str, str] | None = None
    """Mapping from our column names to this source's own; `data.columns` when unset."""


Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "preference",
    "hh_rlhf",
    "prompts",
    "text",
]


class DataSection(Section):
    """Which rows the stage reads and how they become tokens."""

    dataset_name: str | None = None
    """Hub id, file, folder or shipped data card (for several sources use `datasets`)."""
    dataset_config: str | None = None
    """Configuration of a Hub data set."""
    dataset_train_split: str = "train"
    """Split that the stage reads, with slicing (`train[:1%]`)."""
    dataset_test_split: str | None = None
    """Split for evaluation during training."""
    datasets: list[DatasetEntry] | None = None
    """A mixture of sources with weights."""
    test_split_size: Annotated[float, Field(gt=0, lt=1)] | PositiveInt | None = None
    """Rows held out for evaluation during training: a fraction below 1, or their number."""
    format: Format = "auto"
    """Form of the rows; recognised from the columns when `auto`, and always said."""
    columns: dict[str, str] | None = None
    """Mapping from our column names (`prompt`, `completion`, `messages`, `chosen`, ...) to the rows' own."""
    system_prompt: str | None = None
    """System turn put in front of rows that have none."""
    use_tools: bool = True
    """Give the functions in the rows' `tools` to the chat template; off, the column is left out."""
    max_samples: PositiveInt | None = None
    """Read at most this many rows."""
    max_length: PositiveInt | None = 1024
    """Longest sequence in tokens, prompt and completion together."""
    truncation_mode: Literal["keep_start", "drop"] = "keep_start"
    """What becomes of longer rows: cut at the end (the cut is counted and shown), or left out."""
    dataset_num_proc: PositiveInt | None = None
    """Processes that render the rows."""


class LaunchSection(Section):
    """How many processes the stage runs in."""

    num_processes: PositiveInt = 1
    """Processes in all; more than one starts the stage under accelerate."""
    accelerate: str | None = None
    """Accelerate config: a file, or the name of a shipped one (`ddp`, `fsdp2`, `zero3`)."""


class TrainerSection(Section):
    """Optimization, logging and checkpoints; names and meanings are transformers' TrainingArguments'."""

    per_device_train_batch_size: PositiveInt = 8
    """Rows per device and forward pass."""
    per_device_eval_batch_size: PositiveInt = 8
    """Rows per device in evaluation."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    num_train_epochs: PositiveFloat = 1.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps in all, which override the epochs; -1 for whole epochs."""
    lr_scheduler_type: str = "cosine"
    """Shape of the learning rate: `linear`, `cosine`, `constant`, `constant_with_warmup`, ..."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Further arguments of the schedule."""
    warmup_steps: NonNegativeFloat = 0.03
    """Warm-up: steps, or a share of all steps when below 1."""
    optim: str = "adamw_torch"
    """Optimizer by transformers' name (`adamw_torch`, `adamw_8bit`, `paged_adamw_8bit`, ...)."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    adam_beta1: Probability = 0.9
    """Decay of the first moment."""
    adam_beta2: Probability = 0.999
    """Decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the denominator."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient to this norm; 0 turns clipping off."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass to save memory."""
    bf16: bool | None = None
    """bfloat16 mixed precision; on where the GPU has it when unset."""
    seed: NonNegativeInt = 42
    """Seed of adapter initialization, data order and dropout."""
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """Order of the rows; `group_by_length` saves padding."""
    dataloader_num_workers: NonNegativeInt = 0
    """Processes that load batches."""
    logging_steps: PositiveInt = 10
    """Log every so many optimizer steps."""
    save_steps: PositiveInt = 500
    """Save a checkpoint every so many optimizer steps; the same command goes on from the newest complete one."""
    save_total_limit: PositiveInt | None = 2
    """Checkpoints kept while the stage runs."""
    keep_checkpoints: PositiveInt | None = None
    """Leave the weights of so many newest checkpoints in the finished run's folder, for `align average`."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to evaluate during training."""
    eval_steps: PositiveInt | None = None
    """Evaluate every so many steps."""
    report_to: str | list[str] = "none"
    """Trackers: `none`, `tensorboard`, `wandb`, `trackio`, ... (metrics.jsonl is always written)."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further arguments, checked against the trainer's own config and passed on as they are."""


class GenerationSection(Section):
    """How completions are drawn; names are transformers' GenerationConfig's."""

    max_new_tokens: PositiveInt = 512
    """Longest completion in tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus: the smallest set of tokens with this probability mass."""
    top_k: NonNegativeInt = 0
    """Keep only so many most likely tokens; 0 keeps all."""
    generation_batch_size: PositiveInt = 64
    """Completions drawn at once."""


class HubSection(Section):
    """A push to the Hugging Face Hub, once the run is complete; `repo_id` asks for it."""

    repo_id: str | None = None
    """`ORG/NAME` on the Hub: the complete run is pushed there with its tokenizer and a model card."""
    merged: bool = False
    """Push the weights with the adapter merged in, not the adapter."""
    merged_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of merged weights."""
    public: bool = False
    """Make the repository public; it is private when unset."""
    revision: str | None = None
    """Branch that takes the files; made if missing."""
    pr: bool = False
    """Open a pull request instead."""
    collection: str | None = None
    """Slug of a collection that the model is added to."""
    base_model_id: str | None = None
    """The base on the Hub, where an adapter's base is a folder here (`ORG/NAME[@REVISION]`)."""
    samples: NonNegativeInt = 3
    """Sample answers of an evaluation in the card."""


class StageConfig(Section):
    """What every stage has."""

    output_dir: str
    """Run folder; written complete or not at all."""
    launch: LaunchSection = Field(default_factory=LaunchSection)


__all__ = [
    name
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, Section)
]
