"""`align eval`: answers to held-out prompts, scored, with intervals and paired differences."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from align.config.sections import (
    DataSection,
    GenerationSection,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StageConfig,
)
from align.config.suggest import nearest
from align.errors import AlignError, Problem
from align.registry import resolve

if TYPE_CHECKING:
    from align.runs import RunFolder


class EvalGeneration(GenerationSection):
    temperatures: Annotated[list[NonNegativeFloat], Field(min_length=1)] = Field(
        default_factory=lambda: [0.0]
    )
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
    """Name in `models` that the others are compared with by prompt; the reference when unset."""
    best_of: dict[str, PositiveInt] = Field(default_factory=dict)
    """Name in `models` -> K: adds a row for the best of K answers by the reward model."""
    seed: NonNegativeInt = 42
    """Seed of the draws."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the intervals."""
    score_batch_size: PositiveInt = 64
    """Answers scored at once."""


def run(config: EvalConfig, folder: "RunFolder") -> None:
    """Let all models answer, score and compare the answers, write and show the results."""
    from align.durable import write_json
    from align.evaluation.answering import answer_all
    from align.evaluation.results import make_results
    from align.evaluation.sheets import make_sheets, write_answers
    from align.evaluation.tables import results_view
    from align.models.identity import require_reward_model
    from align.report.terminal import console

    check_names(config)
    if config.reward_model is not None:
        require_reward_model(config.reward_model)
    answers = answer_all(config, folder)
    sheets = make_sheets(config, answers)
    if not folder.is_main:
        return
    results = make_results(config, answers, sheets)
    write_answers(folder.artifact / "answers.parquet", answers.prompts, sheets)
    write_json(folder.artifact / "results.json", results)
    for row in results["rows"]:
        folder.log({key: row[key] for key in ("label", "temperature", "scores", "reward", "kl")})
    folder.note("prompts", results["prompts"])
    folder.note("tokens", sum(row["tokens_in_all"] for row in results["rows"]))
    last = results["rows"][-1]
    folder.note("score", last["scores"]["score"]["mean"] if last["scores"] else None)
    if not folder.quiet:
        console(results=True).print(results_view(results))


def check_names(config: EvalConfig) -> None:
    """Refuse names that are no model of the recipe, and a recipe that scores nothing."""
    problems = []
    named = {"reference": config.reference, "baseline": config.baseline}
    named |= {f"best_of.{name}": name for name in config.best_of}
    for key, name in named.items():
        if name is not None and name not in config.models:
            near = nearest(name, config.models)
            known = ", ".join(f"`{model}`" for model in config.models)
            hint = f"did you mean `{near}`?" if near else f"the models are {known}"
            problems.append(Problem(f"no model is called `{name}`", key, hint))
    if config.best_of and config.reward_model is None:
        hint = "set reward_model to the folder of a reward model"
        problems.append(Problem("the best answer is chosen by a reward model", "best_of", hint))
    if config.judge is None and config.reward_model is None:
        hint = "set `judge` to a registered judge, `reward_model` to a folder, or both"
        problems.append(Problem("nothing scores the answers", "judge", hint))
    if problems:
        raise AlignError(*problems)
    if config.judge is not None:
        resolve("judge", config.judge)
