"""`align dpo`: direct preference optimization on chosen/rejected pairs."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.config.sections import (
    DataSection,
    HubSection,
    LoraSection,
    ModelSection,
    NonNegativeFloat,
    PositiveFloat,
    Probability,
    StageConfig,
    TrainerSection,
)

if TYPE_CHECKING:
    from align.runs import RunFolder


class DPOTrainer(TrainerSection):
    learning_rate: PositiveFloat = 5e-6
    """Peak learning rate (5e-6 suits LoRA; full fine-tuning wants about 5e-7)."""


class DPOConfig(StageConfig):
    """Direct preference optimization; the reference is the model the stage starts from."""

    stage: Literal["dpo"] = "dpo"
    model: ModelSection
    lora: LoraSection = Field(default_factory=LoraSection)
    data: DataSection
    trainer: DPOTrainer = Field(default_factory=DPOTrainer)
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference (arXiv 2305.18290, eq. 7)."""
    loss_type: str | list[str] = "sigmoid"
    """TRL's loss or losses: `sigmoid`, `ipo`, `hinge`, `robust`, `exo_pair`, `apo_zero`, `sft`, ..."""
    loss_weights: list[float] | None = None
    """Weights when several losses are added."""
    rpo_alpha: NonNegativeFloat = 0.0
    """Weight of an added loss: the mean negative log-likelihood of the chosen answers' tokens (Llama 3 takes 0.2)."""
    mask_format_tokens: bool = False
    """Leave headers and end-of-turn tokens of both answers out of the loss (arXiv 2407.21783, section 4.1.4)."""
    label_smoothing: Probability = 0.0
    """Assumed share of flipped labels (`sigmoid`, `robust`, `exo_pair`)."""
    f_divergence_type: str = "reverse_kl"
    """Divergence that regularizes the policy (arXiv 2309.16240)."""
    precompute_ref_log_probs: bool = False
    """Compute the reference log-probabilities once before training instead of at each step."""
    padding_free: bool = True
    """Compute the prompt of a pair once and no padding, where the model gives the same states that way."""
    merge_adapter: bool = False
    """Merge the trained adapter into the base, so that the artifact is a full model."""
    hub: HubSection = Field(default_factory=HubSection)


def run(config: DPOConfig, folder: "RunFolder") -> None:
    """Fit a policy to preferences. The reference is the model the stage starts from, whatever
    that is made of, and the first step proves it (rewards 0, sigmoid loss ln 2)."""
    from copy import deepcopy

    from transformers import set_seed

    from align.data.rendering import training_rows
    from align.models.adapters import (
        check_joinable,
        copy_reference,
        expose_trained_head,
        lora_config,
    )
    from align.models.loading import check_model, check_vocabulary, load_policy
    from align.models.tokenizer import load_tokenizer
    from align.training.arguments import dpo_arguments
    from align.training.fitting import fit, save_policy
    from align.training.trainers import DPOTrainer as Trainer

    check_model(config.model)
    check_joinable(config.model, config.lora, merge_adapter=config.merge_adapter)
    set_seed(config.trainer.seed)
    arguments = dpo_arguments(config, folder.checkpoints)
    tokenizer = load_tokenizer(config.model)
    rows = training_rows(config.data, tokenizer, "dpo", mask_format=config.mask_format_tokens)
    folder.data(rows)
    continued = config.model.continues_adapter
    policy = load_policy(config.model, trained=True, train_base=not config.lora.use_peft)
    check_vocabulary(policy, tokenizer)
    adapter = None if continued else lora_config(config.lora, tokenizer=tokenizer, model=policy)
    trainer = Trainer(
        model=policy,
        # With LoRA the reference is the same weights with the new adapter off (or its first copy).
        ref_model=None if config.lora.use_peft else deepcopy(policy),
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        processing_class=tokenizer,
        padding_free=config.padding_free,
        peft_config=adapter,
    )
    copy_reference(trainer.model)
    expose_trained_head(trainer.model)
    fit(trainer, folder)
    save_policy(trainer, folder, config.model, tokenizer, merge_adapter=config.merge_adapter)
