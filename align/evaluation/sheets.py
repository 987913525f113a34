"""The rows of the table of `align eval`: a model at a temperature, its answers and their scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from align.evaluation.answering import Answers, Drawn, setting_of
from align.generation.answers import Answer, Group, Prompt, RewardModel, judge_answers
from align.generation.processes import in_shares
from align.generation.samples import as_json, prompt_columns, write_tables
from align.stages.evaluate import EvalConfig

Array = NDArray[np.float64]


@dataclass
class Sheet:
    """One row of the table: a model at a temperature, with one answer per prompt."""

    model: str
    temperature: float
    best_of: int | None
    answers: list[Answer]
    seconds: float
    """Time of the draw; of a draw of several answers each answer's part."""
    rewards: list[float] | None = None
    scores: dict[str, Array] = field(default_factory=dict)
    """Part of the judge's verdict -> one number per prompt; `score` first."""

    @property
    def label(self) -> str:
        """What the row is called."""
        return self.model if self.best_of is None else f"{self.model} best-of-{self.best_of}"


def make_sheets(config: EvalConfig, answers: Answers) -> list[Sheet]:
    """The rows of the table, in the order of the recipe, with rewards and verdicts."""
    reward_model = (
        RewardModel(config.reward_model, config.score_batch_size) if config.reward_model else None
    )
    sheets: list[Sheet] = []
    for name in config.models:
        for temperature in config.generation.temperatures:
            drawn = answers.draws[name, setting_of(config, temperature)]
            sheets.append(_single(name, temperature, drawn))
            if reward_model:
                sheets[-1].rewards = _first(_rewards(answers, name, drawn, reward_model, 1))
        if name in config.best_of and reward_model:
            drawn = answers.draws[name, setting_of(config, 1.0)]
            count = config.best_of[name]
            rewards = _rewards(answers, name, drawn, reward_model, count)
            sheets.append(_best(name, drawn, rewards, count))
    if config.judge:
        for sheet in sheets:
            _judge(config.judge, answers.prompts[sheet.model], sheet)
        _complete_parts(sheets)
    return sheets


def _single(name: str, temperature: float, drawn: Drawn) -> Sheet:
    answers = [group.answers[0] for group in drawn.groups]
    return Sheet(name, temperature, None, answers, drawn.seconds / len(drawn.groups[0].answers))


def _best(name: str, drawn: Drawn, rewards: list[list[float]], count: int) -> Sheet:
    """The finished answer with the best reward; among unfinished ones only if there is no other."""
    best = []
    for group, row in zip(drawn.groups, rewards, strict=True):
        order = sorted(range(count), key=lambda at: (group.answers[at].ended, row[at]))
        best.append(order[-1])
    answers = [g.answers[at] for g, at in zip(drawn.groups, best, strict=True)]
    sheet = Sheet(name, 1.0, count, answers, drawn.seconds)
    sheet.rewards = [row[at] for row, at in zip(rewards, best, strict=True)]
    return sheet


def _first(rewards: list[list[float]]) -> list[float]:
    return [row[0] for row in rewards]


def _rewards(
    answers: Answers, name: str, drawn: Drawn, reward_model: RewardModel, count: int
) -> list[list[float]]:
    tokenizer = answers.tokenizers[name]

    def work(share: list[tuple[Prompt, Group]]) -> list[list[float]]:
        groups = [Group(group.index, group.answers[:count]) for _, group in share]
        return reward_model.rewards([prompt for prompt, _ in share], groups, tokenizer)

    return in_shares(list(zip(answers.prompts[name], drawn.groups, strict=True)), work)


def _judge(judge: str, prompts: list[Prompt], sheet: Sheet) -> None:
    def work(share: list[tuple[Prompt, Answer]]) -> list[dict[str, float]]:
        asked = [prompt for prompt, answer in share if answer.ended]
        groups = [Group(0, [answer]) for _, answer in share if answer.ended]
        verdicts = iter(judge_answers(judge, asked, groups))
        return [next(verdicts)[0] if answer.ended else {} for _, answer in share]

    verdicts = in_shares(list(zip(prompts, sheet.answers, strict=True)), work)
    parts = ["score", *dict.fromkeys(part for v in verdicts for part in v if part != "score")]
    sheet.scores = {part: np.array([v.get(part, 0.0) for v in verdicts]) for part in parts}
    for answer, verdict in zip(sheet.answers, verdicts, strict=True):
        answer.verdict = verdict


def _complete_parts(sheets: Sequence[Sheet]) -> None:
    """Where no answer of a sheet ended, its parts are known from the other sheets only."""
    parts = list(dict.fromkeys(part for sheet in sheets for part in sheet.scores))
    for sheet in sheets:
        none = np.zeros(len(sheet.answers))
        sheet.scores = {part: sheet.scores.get(part, none) for part in parts}


SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("temperature", pa.float64()),
        ("best_of", pa.int64()),
        ("prompt_index", pa.int64()),
        ("prompt", pa.string()),
        ("row", pa.string()),
        ("answer", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("stop_id", pa.int32()),
        ("tokens", pa.int64()),
        ("ended", pa.bool_()),
        ("score", pa.float64()),
        ("verdict", pa.string()),
        ("reward", pa.float64()),
    ]
)
"""Columns: `prompt` is text or the messages as JSON, `row` the other columns as JSON, `verdict`
the parts of the judge's score as JSON (empty for an answer that never ended)."""


def write_answers(
    path: Path, prompts: Mapping[str, Sequence[Prompt]], sheets: Sequence[Sheet]
) -> None:
    """Write every answer with its scores into one parquet file, a sheet at a time."""
    write_tables(path, SCHEMA, (_table(prompts[sheet.model], sheet) for sheet in sheets))


def _table(prompts: Sequence[Prompt], sheet: Sheet) -> pa.Table:
    rewards: Sequence[float | None] = sheet.rewards or [None] * len(prompts)
    score = sheet.scores.get("score")
    rows = []
    for at, (prompt, answer, reward) in enumerate(
        zip(prompts, sheet.answers, rewards, strict=True)
    ):
        row = {"model": sheet.model, "temperature": sheet.temperature, "best_of": sheet.best_of}
        row |= prompt_columns(prompt)
        row |= {"answer": answer.text, "ids": answer.ids, "stop_id": answer.stop_id}
        row |= {"tokens": len(answer.all_ids), "ended": answer.ended}
        row |= {"score": None if score is None else float(score[at])}
        row |= {"verdict": as_json(answer.verdict), "reward": reward}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SCHEMA)
