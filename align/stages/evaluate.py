"""`align eval`: answers to held-out prompts, scored by a judge, with intervals and paired differences."""

from typing import Annotated, Literal

from pydantic import Field

from align.config.sections import (
    DataSection,
    GenerationSection,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StageConfig,
)
from align.runs import RunFolder


class EvalGeneration(GenerationSection):
    temperatures: Annotated[list[NonNegativeFloat], Field(min_length=1)] = Field(default_factory=lambda: [0.0])
    """Temperatures at which every model answers; 0 is greedy."""


class EvalConfig(StageConfig):
    """Scores of one or more models on held-out prompts."""

    stage: Literal["eval"] = "eval"
    models: Annotated[dict[str, str], Field(min_length=1)]
    """Name -> folder or Hub id of a model or adapter, in the order of the table."""
    data: DataSection
    generation: EvalGeneration = Field(default_factory=EvalGeneration)
    judge: str | None = None
    """Registered judge that scores an answer (ground truth, `number`, `exact`, ...)."""
    reward_model: str | None = None
    """Reward model whose mean score is reported beside the judge's."""
    reference: str | None = None
    """Name in `models` that the KL divergence is measured to."""
    baseline: str | None = None
    """Name in `models` that the others are compared with, pair by pair; the reference when unset."""
    best_of: dict[str, PositiveInt] = Field(default_factory=dict)
    """Name in `models` -> K: adds a row for the best of K by the reward model (needs `reward_model`)."""
    seed: NonNegativeInt = 42
    """Seed of the draws."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the intervals."""
    score_batch_size: PositiveInt = 64
    """Answers scored at once."""
