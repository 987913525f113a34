"""`align ppo`: proximal policy optimization against a reward model, all roles on one shared base."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from align.config.sections import (
    DataSection,
    GenerationSection,
    HubSection,
    LoraSection,
    ModelSection,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
    StageConfig,
    TrainerSection,
)

if TYPE_CHECKING:
    from align.runs import RunFolder


class PPOTrainer(TrainerSection):
    per_device_train_batch_size: PositiveInt = 8
    """Episodes per device and forward pass (a micro-batch; nothing is padded)."""
    gradient_accumulation_steps: PositiveInt = 4
    """Micro-batches per step; a rollout has batch x accumulation x `num_mini_batches` x processes episodes."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of the policy (1e-5 suits LoRA; full fine-tuning wants about 1e-6)."""
    num_train_epochs: PositiveFloat = 1.0
    """Passes over the prompts."""
    max_steps: int = -1
    """Optimizer steps in all; overrides the epochs when positive."""
    lr_scheduler_type: str = "linear"
    """Shape of the learning rates: `linear`, `cosine`, `constant`, `constant_with_warmup`, ..."""
    adam_epsilon: PositiveFloat = 1e-5
    """Added to the denominator (1e-5 is PPO's own; arXiv 2403.17031)."""
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """Order of the prompts; `group_by_length` also sorts the episodes of a minibatch by length."""


class PPOGeneration(GenerationSection):
    num_generations: PositiveInt = 1
    """Answers to each prompt of a rollout; a prompt is computed once for all of them."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature of the draws and of every log-probability."""
    fold_adapter: bool | None = None
    """Fold the adapter into a copy of the weights while drawing; unset: where weights are float32."""


class PPOScorer(Section):
    """Who scores the answers: a reward model, functions, or both with weights."""

    reward_model: str | None = None
    """Folder or Hub id of a reward model; an adapter on the policy's own base shares its weights."""
    reward_model_weight: float = 1.0
    """Its weight in the sum."""
    reward_funcs: dict[str, float] = Field(default_factory=dict)
    """Registered reward functions and judges with their weights (`FILE.py:NAME` needs `--allow-code`)."""
    score_batch_size: PositiveInt = 64
    """Answers that a reward model of its own weights scores at once."""
    share_base: bool = True
    """Put a fitting reward adapter on the policy's base; `false` loads the reward model on its own."""


class AlarmSection(Section):
    """When a run says that something is wrong, and which alarms end it."""

    patience: PositiveInt = 3
    """Rollouts in a row that show it."""
    length_growth: PositiveFloat = 1.5
    """Mean length against the first rollout's, while the reward rises."""
    kl_per_token: PositiveFloat = 0.15
    """Distance from the reference in nats per token."""
    eos_drop: Probability = 0.1
    """Fall of the share of answers that end their turn."""
    saturated_share: Probability = 0.5
    """Share of the scores at the clip."""
    unique_share: Probability = 0.5
    """Share of different answers against the first rollout's."""
    critic_grace: NonNegativeInt = 5
    """Rollouts in which the values may still explain nothing."""
    stop_on: list[Literal["length", "kl", "eos", "critic", "saturation", "collapse"]] = Field(
        default_factory=list
    )
    """Alarms that end the run; it then keeps the last policy before them."""


class PPOConfig(StageConfig):
    """Proximal policy optimization with a learned reward; the reference is the model the stage starts from."""

    stage: Literal["ppo"] = "ppo"
    model: ModelSection
    lora: LoraSection = Field(default_factory=LoraSection)
    data: DataSection
    trainer: PPOTrainer = Field(default_factory=PPOTrainer)
    generation: PPOGeneration = Field(default_factory=PPOGeneration)
    scorer: PPOScorer
    alarms: AlarmSection = Field(default_factory=AlarmSection)
    total_episodes: PositiveInt | None = None
    """Episodes in all, rounded up to whole rollouts; overrides the passes over the prompts."""
    num_ppo_epochs: PositiveInt = 1
    """Passes over each rollout."""
    num_mini_batches: PositiveInt = 4
    """Optimizer steps per pass."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL penalty in every token's reward."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimator of the penalty: `k1` (unbiased) or `k3` (less variance); both are logged."""
    kl_target: PositiveFloat | None = None
    """Wanted KL of an answer in nats: the coefficient adapts to it (arXiv 1909.08593)."""
    kl_horizon: PositiveInt = 10_000
    """Episodes in which an adaptive coefficient may change by 20 %."""
    gamma: Probability = 1.0
    """Discount."""
    lam: Probability = 0.95
    """Trace decay of the advantages (GAE)."""
    lam_value: Probability | None = None
    """Trace decay of the values' targets; as `lam` when unset (decoupled: arXiv 2503.01491)."""
    lam_length_alpha: PositiveFloat | None = None
    """Decay that grows with the answer's length, 1 - 1 / (alpha x length), instead of `lam` (arXiv 2504.05118)."""
    cliprange: PositiveFloat = 0.2
    """Clip range of the policy's ratio."""
    cliprange_high: PositiveFloat | None = None
    """Upper clip range when it differs (0.28: arXiv 2503.14476)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the loss for negative advantages (3.0: arXiv 1912.09729)."""
    cliprange_value: PositiveFloat | None = 0.2
    """Clip range of the values around their old ones; null: no clipping."""
    vf_coef: PositiveFloat = 0.1
    """Weight of the value's loss where the value reads the policy's hidden states."""
    value_model: Literal["adapter", "policy"] = "adapter"
    """Weights of the value: an adapter (or model) of its own, or only a head on the policy's."""
    value_init: Literal["reward", "zero"] = "reward"
    """Start the value from the reward model on the same base, or from zero."""
    value_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the value; twice the policy's when unset."""
    critic_warmup_steps: NonNegativeInt = 0
    """First optimizer steps in which only the value learns."""
    target_kl: PositiveFloat | None = None
    """Leave the policy alone for the rest of a rollout once an update moved it this far (mean k3 per token)."""
    whiten_advantages: bool = True
    """Advantages with mean 0 and variance 1 over the whole rollout of all processes."""
    whiten_rewards: bool = False
    """Token rewards with variance 1, their mean kept (makes answers shorter)."""
    reward_normalization: Literal["first", "none"] = "first"
    """Mean 0 and deviation 1 of the scores in the first rollout, or scores as they are (`none`, for a reward that is
    rare at first: its tiny first deviation would lift later ones to `reward_clip`)."""
    reward_clip: PositiveFloat | None = 10.0
    """Clip the normalized score to this range; null: no clipping."""
    missing_eos_penalty: NonNegativeFloat | None = 1.0
    """Taken from the score of an answer that never ended its turn; null: nothing."""
    missing_eos_score: float | None = None
    """Score of an unfinished answer, whatever the reward model says; the penalty is not applied then."""
    sample_rollouts: PositiveInt = 10
    """Write a table of samples every so many rollouts (samples.jsonl)."""
    merge_adapter: bool = False
    """Merge the trained adapter into the base, so that the artifact is a full model."""
    hub: HubSection = Field(default_factory=HubSection)


def run(config: PPOConfig, folder: "RunFolder") -> None:
    """Improve a policy by its own answers and their scores, and save it like every other stage does."""
    from transformers import set_seed

    from align.generation.answers import load_prompts
    from align.models.adapters import check_joinable
    from align.models.tokenizer import load_tokenizer
    from align.ppo.casting import cast_roles, make_scorer
    from align.ppo.trainer import PPOTrainer as Trainer
    from align.training.fitting import fit, save_policy

    check_joinable(config.model, config.lora, merge_adapter=config.merge_adapter)
    set_seed(config.trainer.seed)
    tokenizer = load_tokenizer(config.model)
    prompts = load_prompts(config.data, tokenizer, folder)
    roles = cast_roles(config, tokenizer, prompts)
    scorer = make_scorer(config, roles, prompts, tokenizer)
    trainer = Trainer(config, roles, tokenizer, prompts, scorer, folder)
    fit(trainer, folder)
    trainer.close()
    save_policy(trainer, folder, config.model, tokenizer, merge_adapter=config.merge_adapter)
