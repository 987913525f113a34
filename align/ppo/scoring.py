"""Who scores an episode: reward models and registered functions, each with a weight.

With `reward_normalization: first` the deviation of the first rollout's scores divides all later ones. A reward that
is rare at first (one right answer in a hundred) has a tiny deviation, so that later scores are large and
`reward_clip` caps them: every success then counts `reward_clip`, whatever its size. Such rewards want
`reward_normalization: none`.
"""

import importlib.util
import inspect
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.sections import ModelSection
from align.environment import ALLOW_CODE
from align.errors import fail
from align.evaluation.judges import ask
from align.generation.answers import Answer, Group, Prompt, RewardModel
from align.ppo.experience import Episode
from align.registry import REWARD_FUNCS, code_file, resolve_reward

Scorer = Callable[[Sequence[Episode]], list[float]]
"""Scores of episodes, in their order."""


def reward_model_scorer(
    path: str,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    batch_size: int,
    like: ModelSection | None = None,
) -> Scorer:
    """Scores by a reward model of its own weights; its tokenizer may be another one than the policy's."""
    model = RewardModel(path, batch_size, like)

    def score(episodes: Sequence[Episode]) -> list[float]:
        asked = [prompts[episode.prompt] for episode in episodes]
        groups = [Group(e.prompt, [Answer(e.text, e.answer_ids, None)]) for e in episodes]
        return [row[0] for row in model.rewards(asked, groups, tokenizer)]

    return score


def function_scorer(name: str, prompts: Sequence[Prompt]) -> Scorer:
    """Scores by a registered reward function or judge, or by `FILE.py:NAME` where `--allow-code` was given."""
    code = code_file(name)
    function = _from_file(*code) if code else resolve_reward(name)
    if _is_judge(function) or not (code or name in REWARD_FUNCS):

        def by_judge(episodes: Sequence[Episode]) -> list[float]:
            found = []
            for episode in episodes:
                prompt = prompts[episode.prompt]
                found.append(ask(function, name, prompt.row, episode.text, prompt.where)["score"])
            return found

        return by_judge

    def score(episodes: Sequence[Episode]) -> list[float]:
        return _call(function, name, [prompts[e.prompt] for e in episodes], episodes)

    return score


def _is_judge(function: Callable[..., Any]) -> bool:
    """A judge takes `(row, completion)`, a reward function lists: `(prompts, completions, **columns)`."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return names[:2] == ["row", "completion"]


def _call(
    function: Callable[..., Any], name: str, prompts: list[Prompt], episodes: Sequence[Episode]
) -> list[float]:
    columns = {
        key: [prompt.row.get(key) for prompt in prompts]
        for key in sorted({key for prompt in prompts for key in prompt.row} - {"prompt"})
    }
    where = f"reward function `{name}`"
    rows = f"{prompts[0].where} to {prompts[-1].where}" if prompts else "no rows"
    try:
        found = function(
            prompts=[prompt.row["prompt"] for prompt in prompts],
            completions=[episode.text for episode in episodes],
            **columns,
        )
    except Exception as error:
        fail(
            f"raised {type(error).__name__}: {error}",
            where=f"{where}, {rows}",
            hint="the run goes on from its checkpoint with the same command once it is mended",
        )
    scores = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(scores, Sequence):  # an array without a dimension is a number
        fail(f"returned {type(found).__name__} instead of a list of numbers", where=where)
    if len(scores) != len(episodes):
        fail(
            f"returned {len(scores)} scores for {len(episodes)} completions",
            where=where,
            hint="return one number per completion, in their order",
        )
    for prompt, score in zip(prompts, scores, strict=True):
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            fail(f"returned {score!r}, which is no finite number", where=f"{where}, {prompt.where}")
    return [float(score) for score in scores]


def _from_file(file: Path, attribute: str) -> Callable[..., Any]:
    if os.environ.get(ALLOW_CODE) != "1":
        fail(
            f"runs code from {file}, which nobody allowed",
            where="scorer.reward_funcs",
            hint="add `--allow-code` to the command if you trust that file, or register the function in a "
            "package (entry point `align.reward_funcs`)",
        )
    if not file.is_file():
        fail("no such file", where=f"scorer.reward_funcs: {file}")
    spec = importlib.util.spec_from_file_location(f"align_reward_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        fail(f"cannot be imported: {type(error).__name__}: {error}", where=str(file))
    function = getattr(module, attribute, None)
    if not callable(function):
        fail(f"has no function `{attribute}`", where=str(file))
    found: Callable[..., Any] = function
    return found


def weighted(scorers: Mapping[str, tuple[Scorer, float]]) -> Scorer:
    """The weighted sum of several scorers."""

    def score(episodes: Sequence[Episode]) -> list[float]:
        total = [0.0] * len(episodes)
        for scorer, weight in scorers.values():
            for place, value in enumerate(scorer(episodes)):
                total[place] += weight * value
        return total

    return score
