"""Scores by task: what a mean hides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.report.html.exam import Exam
from align.report.html.text import interval, signed, temperature


@dataclass(frozen=True)
class TaskCell:
    """A model's score on a task."""

    value: str
    title: str
    direction: str
    """`up` or `down` where the whole interval of the change to the baseline lies on one side of 0."""


@dataclass(frozen=True)
class TaskTable:
    """Tasks by models at one temperature."""

    head: str
    labels: tuple[tuple[str, str], ...]
    """Model and its colour."""
    rows: tuple[tuple[str, int, tuple[TaskCell, ...]], ...]
    """Task, its prompts, and a cell per model."""
    refusals: tuple[tuple[str, tuple[str, ...]], ...]
    """Share refused of unsafe and of safe prompts, a cell per model."""
    parts: tuple[tuple[str, tuple[str, ...]], ...]
    """Mean of every part of the judge's verdict."""
    temperature: str


def task_table(exam: Exam, colours: Mapping[str, str]) -> list[TaskTable]:
    """A table per temperature; none where neither tasks nor parts nor refusals are known."""
    found = [_table(exam, colours, at) for at in exam.temperatures]
    return [table for table in found if table.rows or table.refusals or len(table.parts) > 1]


def _table(exam: Exam, colours: Mapping[str, str], at: float) -> TaskTable:
    rows = {label: row for label in exam.labels if (row := exam.row(label, at))}
    tasks = exam.results.get("tasks") or {}
    parts = list(next(iter(rows.values())).get("scores") or {}) if rows else []
    refused = any(row.get("refusals") for row in rows.values())
    return TaskTable(
        exam.part,
        tuple((label, colours.get(label, "s6")) for label in rows),
        tuple(
            (task, count, tuple(_cell(row, task) for row in rows.values()))
            for task, count in tasks.items()
        )
        if exam.part == "score"
        else (),
        tuple(
            (f"refused, of {side} prompts", _means(rows, "refusals", side))
            for side in ("unsafe", "safe")
        )
        if refused
        else (),
        tuple((part, _means(rows, "scores", part)) for part in parts),
        temperature(at),
    )


def _cell(row: Mapping[str, Any], task: str) -> TaskCell:
    found = ((row.get("tasks") or {}).get(task) or {}).get("scores", {}).get("score")
    if not found:
        return TaskCell("", "", "")
    change = (((row.get("difference") or {}).get("tasks") or {}).get(task) or {}).get("score")
    title = interval(found)
    direction = ""
    if change:
        title += (
            f"; change {signed(change['mean'])} [{signed(change['low'])}, {signed(change['high'])}]"
        )
        direction = "up" if change["low"] > 0 else "down" if change["high"] < 0 else ""
    return TaskCell(f"{found['mean']:.2f}", title, direction)


def _means(rows: Mapping[str, Mapping[str, Any]], *keys: str) -> tuple[str, ...]:
    found = []
    for row in rows.values():
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        found.append(f"{value['mean']:.2f}" if value else "")
    return tuple(found)
