"""`align sft`: supervised fine-tuning on demonstrations, with LoRA, DoRA, rsLoRA or all parameters."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.config.sections import (
    DataSection,
    HubSection,
    LoraSection,
    ModelSection,
    PositiveFloat,
    StageConfig,
    TrainerSection,
)

if TYPE_CHECKING:
    from align.runs import RunFolder


class SFTData(DataSection):
    assistant_only_loss: bool = True
    """Loss on assistant turns only (with their end-of-turn token); `false` puts every token into the loss."""
    packing: bool = False
    """Fill sequences of `max_length` with whole rows, without attention between them."""


class SFTTrainer(TrainerSection):
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate (2e-4 suits LoRA; full fine-tuning wants about 1e-5)."""
    loss_type: Literal["nll", "dft"] = "nll"
    """`nll`, or dynamic fine-tuning (arXiv 2508.05629)."""


class SFTConfig(StageConfig):
    """Supervised fine-tuning on demonstrations."""

    stage: Literal["sft"] = "sft"
    model: ModelSection
    lora: LoraSection = Field(default_factory=LoraSection)
    data: SFTData
    trainer: SFTTrainer = Field(default_factory=SFTTrainer)
    merge_adapter: bool = False
    """Merge the trained adapter into the base, so that the artifact is a full model."""
    hub: HubSection = Field(default_factory=HubSection)


def run(config: SFTConfig, folder: "RunFolder") -> None:
    """Fit a policy to demonstrations and save it as an adapter or a full model."""
    from transformers import set_seed

    from align.data.rendering import training_rows
    from align.models.adapters import check_joinable, expose_trained_head, lora_config
    from align.models.loading import check_model, check_vocabulary, load_policy
    from align.models.tokenizer import load_tokenizer
    from align.training.arguments import sft_arguments
    from align.training.fitting import fit, save_policy
    from align.training.trainers import SFTTrainer as Trainer

    check_model(config.model)
    check_joinable(config.model, config.lora, merge_adapter=config.merge_adapter)
    set_seed(config.trainer.seed)
    arguments = sft_arguments(config, folder.checkpoints)
    tokenizer = load_tokenizer(config.model)
    rows = training_rows(
        config.data, tokenizer, "sft", assistant_only=config.data.assistant_only_loss
    )
    folder.data(rows)
    continued = config.model.continues_adapter
    policy = load_policy(config.model, trained=True, train_base=not config.lora.use_peft)
    check_vocabulary(policy, tokenizer)
    adapter = None if continued else lora_config(config.lora, tokenizer=tokenizer, model=policy)
    trainer = Trainer(
        model=policy,
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    expose_trained_head(trainer.model)
    fit(trainer, folder)
    save_policy(trainer, folder, config.model, tokenizer, merge_adapter=config.merge_adapter)
