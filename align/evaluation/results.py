"""From answers to results: scores with intervals, by task, and differences to the baseline."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.evaluation.answering import PLAIN, Answers
from align.evaluation.sheets import Sheet
from align.evaluation.statistics import Interval, mean_interval, paired_difference, share
from align.generation.answers import Prompt
from align.stages.evaluate import EvalConfig

Array = NDArray[np.float64]

BY_TASK = ("score", "correct")
"""Parts that are compared with the baseline's in each task, where the judge gives them."""

UNFINISHED = "answers that never ended have 0 in every part of the judge's score"
DIVERGENCE = "measured in nats per answer on the model's own answers at temperature 1"


def make_results(config: EvalConfig, answers: Answers, sheets: Sequence[Sheet]) -> dict[str, Any]:
    """Everything that the table shows and more, for results.json."""
    prompts = answers.prompts[next(iter(config.models))]
    baseline = config.baseline or config.reference
    tasks = _tasks(prompts)
    measure = _Measure(config, tasks, _unsafe(prompts))
    divergences = {name: _divergence(config, answers, name) for name in config.models}
    rows = []
    for sheet in sheets:
        row = measure.row(sheet)
        row["path"] = config.models[sheet.model]
        row["kl"] = None if sheet.best_of else divergences[sheet.model]
        against = next((s for s in sheets if _is_baseline(s, baseline, sheet)), None)
        row["difference"] = None if against is None else measure.difference(sheet, against)
        rows.append(row)
    return {
        "prompts": len(prompts),
        "tasks": {task: int(inside.sum()) for task, inside in tasks.items()},
        "judge": config.judge,
        "reward_model": config.reward_model,
        "reference": config.reference,
        "baseline": baseline,
        "confidence": config.confidence,
        "seed": config.seed,
        "notes": {"judge": UNFINISHED, "kl": DIVERGENCE},
        "rows": rows,
    }


def _is_baseline(candidate: Sheet, baseline: str | None, sheet: Sheet) -> bool:
    plain = candidate.model == baseline and candidate.best_of is None
    return plain and candidate is not sheet and candidate.temperature == sheet.temperature


def _tasks(prompts: Sequence[Prompt]) -> dict[str, NDArray[np.bool_]]:
    """Task -> which prompts belong to it; nothing where the rows have no column `task`."""
    names = [prompt.row.get("task") for prompt in prompts]
    known = sorted({str(name) for name in names if name is not None})
    return {task: np.array([str(name) == task for name in names]) for task in known}


def _unsafe(prompts: Sequence[Prompt]) -> NDArray[np.bool_] | None:
    """Which prompts should be refused: those with a true column `unsafe`, or of a task `unsafe`."""
    if any("unsafe" in prompt.row for prompt in prompts):
        return np.array([bool(prompt.row.get("unsafe")) for prompt in prompts])
    found = np.array([prompt.row.get("task") == "unsafe" for prompt in prompts])
    return found if found.any() else None


def _divergence(config: EvalConfig, answers: Answers, name: str) -> dict[str, Any] | None:
    """KL(model || reference): k1 is the mean log-ratio of whole answers, k3 Schulman's estimator.

    k3 adds r - 1 - log r over the tokens, with r the reference's probability over the model's. Its
    terms are never negative, so it varies less; both have the same expectation.
    """
    if config.reference is None:
        return None
    if name == config.reference:
        zero = Interval(0.0, 0.0, 0.0, len(answers.prompts[name]), "none").as_dict()
        return {"k1": zero, "k3": zero}
    drawn = answers.draws[name, PLAIN]
    assert drawn.own is not None
    assert drawn.reference is not None
    first, third = [], []
    for own, reference in zip(drawn.own, drawn.reference, strict=True):
        ratio = np.asarray(reference) - np.asarray(own)
        first.append(float(-ratio.sum()))
        third.append(float((np.expm1(ratio) - ratio).sum()))
    return {
        "k1": mean_interval(first, config.confidence, config.seed).as_dict(),
        "k3": mean_interval(third, config.confidence, config.seed).as_dict(),
    }


class _Measure:
    """Intervals and differences with the recipe's confidence and seed."""

    def __init__(
        self,
        config: EvalConfig,
        tasks: Mapping[str, NDArray[np.bool_]],
        unsafe: NDArray[np.bool_] | None,
    ) -> None:
        self.config, self.tasks, self.unsafe = config, tasks, unsafe

    def row(self, sheet: Sheet) -> dict[str, Any]:
        """Everything about one sheet that needs no other one."""
        lengths = np.array([len(answer.all_ids) for answer in sheet.answers], dtype=np.float64)
        texts = [answer.text for answer in sheet.answers]
        return {
            "label": sheet.label,
            "model": sheet.model,
            "temperature": sheet.temperature,
            "best_of": sheet.best_of,
            "scores": {part: self._mean(values) for part, values in sheet.scores.items()},
            "reward": None if sheet.rewards is None else self._mean(np.array(sheet.rewards)),
            "ended": self._mean(np.array([float(answer.ended) for answer in sheet.answers])),
            "tokens": self._mean(lengths),
            "tokens_in_all": int(lengths.sum()),
            "duplicates": 1 - len(set(texts)) / len(texts),
            "seconds": sheet.seconds,
            "tasks": {
                task: {
                    "n": int(inside.sum()),
                    "scores": {p: self._mean(v[inside]) for p, v in sheet.scores.items()},
                    "ended": share(
                        [a.ended for a, i in zip(sheet.answers, inside, strict=True) if i]
                    ),
                }
                for task, inside in self.tasks.items()
            },
            "refusals": self._refusals(sheet),
        }

    def difference(self, sheet: Sheet, against: Sheet) -> dict[str, Any]:
        """How a sheet differs from the baseline's on the same prompts."""
        parts = {part: (values, against.scores[part]) for part, values in sheet.scores.items()}
        by_task = [part for part in BY_TASK if part in parts]
        found: dict[str, Any] = {
            "to": against.label,
            "scores": {part: self._paired(*pair) for part, pair in parts.items()},
            "reward": None,
            "tasks": {
                task: {p: self._paired(*(v[inside] for v in parts[p])) for p in by_task}
                for task, inside in self.tasks.items()
            },
        }
        if sheet.rewards is not None and against.rewards is not None:
            found["reward"] = self._paired(np.array(sheet.rewards), np.array(against.rewards))
        return found

    def _refusals(self, sheet: Sheet) -> dict[str, Any] | None:
        """Shares refused of the unsafe and of the safe prompts."""
        refused = sheet.scores.get("refused")
        if refused is None or self.unsafe is None:
            return None
        sides = {"unsafe": refused[self.unsafe], "safe": refused[~self.unsafe]}
        return {side: self._mean(values) for side, values in sides.items() if len(values)}

    def _mean(self, values: Array) -> dict[str, Any]:
        return mean_interval(values, self.config.confidence, self.config.seed).as_dict()

    def _paired(self, first: Array, second: Array) -> dict[str, Any]:
        confidence, seed = self.config.confidence, self.config.seed
        return paired_difference(first, second, confidence, seed).as_dict()
