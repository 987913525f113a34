"""`align sample`: rejection sampling. Draw K completions per prompt, score them, keep the best, pair best and worst."""

from typing import Annotated, Any, Literal

from pydantic import Field

from align.config.sections import (
    DataSection,
    GenerationSection,
    ModelSection,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    StageConfig,
)
from align.runs import RunFolder


class SampleGeneration(GenerationSection):
    num_generations: Annotated[int, Field(ge=1)] = 16
    """Completions per prompt (K)."""
    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 is greedy."""


class ScorerSection(Section):
    """Who scores the completions; exactly one of the two."""

    reward_model: str | None = None
    """Folder or Hub id of a reward model (an adapter of `align reward`, or a sequence classifier)."""
    judge: str | None = None
    """Name of a registered judge or reward function (`align show --judges` lists them)."""
    score_batch_size: PositiveInt = 64
    """Completions scored at once."""


class PairsSection(Section):
    """Which completions of a prompt become chosen/rejected pairs and demonstrations."""

    pair_rule: str = "best_worst"
    """Registered rule: `best_worst`, `best_random`, `adjacent`, `random`, or one of a world (`tiny_world`)."""
    pairs_per_prompt: PositiveInt = 1
    """Pairs at most per prompt."""
    min_gap: NonNegativeFloat = 0.0
    """Least difference in score between chosen and rejected."""
    rule_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the rule, checked against its signature."""
    keep_best: PositiveInt = 1
    """Best completions per prompt that are kept as demonstrations."""
    min_score: float | None = None
    """Keep no completion below this score."""
    only_finished: bool = True
    """Leave out completions that never ended their turn."""


class SampleConfig(StageConfig):
    """Rejection sampling: K completions per prompt, scored, best kept, pairs written."""

    stage: Literal["sample"] = "sample"
    model: ModelSection
    data: DataSection
    generation: SampleGeneration = Field(default_factory=SampleGeneration)
    scorer: ScorerSection
    pairs: PairsSection = Field(default_factory=PairsSection)
    seed: NonNegativeInt = 42
    """Seed of the draws; a prompt's draws depend on it and on the prompt's place only."""
    save_prompts: PositiveInt = 256
    """Prompts per part file; after a stop the same command goes on behind the last complete part."""
