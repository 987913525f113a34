"""`align reward`: a Bradley-Terry reward model from preference pairs."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.config.sections import (
    DataSection,
    HubSection,
    LoraSection,
    ModelSection,
    NonNegativeFloat,
    PositiveFloat,
    StageConfig,
    TrainerSection,
)
from align.errors import fail

if TYPE_CHECKING:
    from align.runs import RunFolder


class RewardTrainer(TrainerSection):
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""


class RewardConfig(StageConfig):
    """Bradley-Terry reward model on preference pairs."""

    stage: Literal["reward"] = "reward"
    model: ModelSection
    lora: LoraSection = Field(default_factory=LoraSection)
    data: DataSection
    trainer: RewardTrainer = Field(default_factory=RewardTrainer)
    center_rewards_coefficient: NonNegativeFloat | None = None
    """Weight of a term that keeps the rewards around zero (arXiv 2312.09244, eq. 2)."""
    use_margin: bool = False
    """Subtract the rows' `margin` in the loss (Llama 2); without it the margin is only used in the report."""
    padding_free: bool = True
    """Compute the prompt of a pair once and no padding, where the model gives the same states that way."""
    merge_adapter: bool = False
    """Merge the trained adapter into the base, so that the artifact is a full sequence classifier."""
    hub: HubSection = Field(default_factory=HubSection)


def run(config: RewardConfig, folder: "RunFolder") -> None:
    """Fit a scalar head (and an adapter) to preferences, save it, prove that it loads, report."""
    from transformers import set_seed

    from align.data.rendering import training_rows
    from align.models.adapters import lora_config
    from align.models.loading import load_reward_start
    from align.models.tokenizer import load_tokenizer
    from align.training.arguments import reward_arguments
    from align.training.fitting import fit
    from align.training.reward_model import save_and_verify
    from align.training.trainers import RewardTrainer as Trainer

    check_artifact(config)
    set_seed(config.trainer.seed)
    arguments = reward_arguments(config, folder.checkpoints)
    tokenizer = load_tokenizer(config.model)
    rows = training_rows(config.data, tokenizer, "reward", require_margin=config.use_margin)
    folder.data(rows)
    columns = [*TOKEN_COLUMNS, "margin"] if config.use_margin else TOKEN_COLUMNS
    continued = config.model.continues_adapter
    model = load_reward_start(config.model, train_base=not config.lora.use_peft)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows.train.select_columns(columns),
        eval_dataset=rows.test.select_columns(columns) if rows.test else None,
        processing_class=tokenizer,
        padding_free=config.padding_free,
        peft_config=None
        if continued
        else lora_config(config.lora, reward=True, tokenizer=tokenizer, model=model),
    )
    fit(trainer, folder)
    save_and_verify(trainer, folder, config, tokenizer, rows)


TOKEN_COLUMNS = ["chosen_ids", "rejected_ids"]


def check_artifact(config: RewardConfig) -> None:
    """Refuse what no adapter could hold: a reward adapter sits on weights that have a name."""
    folded = config.model.adapter_name_or_path and config.model.adapter_mode == "stack"
    if folded and config.lora.use_peft and not config.merge_adapter:
        fail(
            "is folded into the base first, so a reward adapter alone would sit on other weights",
            where=f"model.adapter_name_or_path: {config.model.adapter_name_or_path}",
            hint="set merge_adapter: true, which writes a full reward model",
        )
