"""`align sample`: rejection sampling. Draw K completions per prompt, score, keep the best, pair."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from align.errors import fail
from align.registry import resolve

if TYPE_CHECKING:
    from align.runs import RunFolder


class SampleGeneration(GenerationSection):
    num_generations: Annotated[int, Field(ge=1)] = 16
    """Completions per prompt (K)."""
    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 is greedy."""


class ScorerSection(Section):
    """Who scores the completions; exactly one of the two."""

    reward_model: str | None = None
    """Folder or Hub id of a reward model (made by `align reward`, or a sequence classifier)."""
    judge: str | None = None
    """Name of a registered judge or reward function (`align show --judges` lists them)."""
    score_batch_size: PositiveInt = 64
    """Completions scored at once."""


class PairsSection(Section):
    """Which completions of a prompt become chosen/rejected pairs and demonstrations."""

    pair_rule: str = "best_worst"
    """Registered rule: `best_worst`, `best_random`, `adjacent`, `random`, `tiny_world`."""
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
    """Prompts per part file; after a stop the same command goes on behind the finished parts."""


def run(config: SampleConfig, folder: "RunFolder") -> None:
    """Draw and score part by part, keep the best, pair, report; finished parts are not redone."""
    from align.durable import write_json
    from align.generation.answers import load_prompts
    from align.generation.pairing import apply_rule, check_options
    from align.generation.rejection import demonstrations, draw_missing, rule_groups
    from align.generation.samples import PartFiles, write_lines
    from align.generation.yields import say_report, yield_report
    from align.models.identity import require_reward_model
    from align.models.tokenizer import load_tokenizer

    check_scorer(config.scorer)
    if config.scorer.reward_model is not None:
        require_reward_model(config.scorer.reward_model)
    rule = resolve("pair rule", config.pairs.pair_rule)
    check_options(config.pairs.pair_rule, rule, config.pairs.rule_options)
    tokenizer = load_tokenizer(config.model)
    prompts = load_prompts(config.data, tokenizer, folder)
    parts = PartFiles(folder.parts, prompts, config.save_prompts)
    draw_missing(config, folder, tokenizer, parts)
    if not folder.is_main:
        return
    groups = list(parts.groups())
    sft = demonstrations(prompts, groups)
    pairs = apply_rule(
        rule,
        rule_groups(prompts, groups, only_finished=config.pairs.only_finished),
        seed=config.seed,
        pairs_per_prompt=config.pairs.pairs_per_prompt,
        min_gap=config.pairs.min_gap,
        options=config.pairs.rule_options,
    )
    parts.join(folder.artifact / "samples.parquet")
    write_lines(folder.artifact / "sft.jsonl", sft)
    write_lines(folder.artifact / "pairs.jsonl", pairs)
    report = yield_report(groups, sft, pairs)
    write_json(folder.artifact / "report.json", report)
    for key in ("prompts", "completions", "tokens", "finished", "demonstrations", "pairs"):
        folder.note(key, report[key])
    folder.note("score", report["score"]["mean"])
    folder.note("best_score", report["growth"][-1]["max"])
    if not folder.quiet:
        say_report(folder.name, report)


def check_scorer(scorer: ScorerSection) -> None:
    """Refuse a recipe that does not name exactly one scorer, or a judge that nobody registered."""
    if (scorer.reward_model is None) == (scorer.judge is None):
        given = "neither is" if scorer.judge is None else "both are"
        fail(
            f"one of `reward_model` and `judge` scores the completions, and {given} given",
            where="scorer",
            hint="give scorer.reward_model a folder, or scorer.judge the name of a judge",
        )
    if scorer.judge is not None:
        resolve("judge", scorer.judge)
