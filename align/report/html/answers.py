"""Every answer that the evaluation kept: distributions of rewards and lengths, and answers side by side."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from align.data.exact import turn_text
from align.report.html.exam import Exam
from align.report.html.gather import Run
from align.report.html.text import clean, number

SHOWN = 8
"""Prompts whose answers are shown, spread evenly over the tasks."""
EXTREMES = 3
"""Further prompts where the final model lost most, and where it gained most."""
LONGEST = 1500
"""Characters of an answer that are shown."""
MOST_WORDS = 400
"""Words of an answer up to which differences are marked."""
ALIKE = 0.5
"""Likeness below which nearly every word would be marked, so that none is."""

WORDS = re.compile(r"\s*(?:\w+|[^\w\s]|$)")
"""A word or a sign with the space before it, which does not count when words are compared."""

COLUMNS = ("model", "temperature", "best_of", "prompt_index", "tokens", "ended", "score", "reward")


@dataclass(frozen=True)
class Sheet:
    """The answers of one row of the table, in the order of the prompts."""

    label: str
    temperature: float
    rows: Sequence[Mapping[str, Any]]

    def numbers(self, column: str) -> list[float]:
        """A column without what is missing."""
        return [float(row[column]) for row in self.rows if row[column] is not None]


@dataclass(frozen=True)
class Answers:
    """answers.parquet of an evaluation."""

    file: Path
    sheets: tuple[Sheet, ...]

    def sheet(self, label: str | None, at: float) -> Sheet | None:
        """The answers of a label at a temperature."""
        return next((s for s in self.sheets if s.label == label and s.temperature == at), None)

    @cached_property
    def prompts(self) -> dict[int, tuple[str, str]]:
        """Index of a prompt -> its text and its task."""
        table = _columns(self.file, "prompt_index", "prompt", "row")
        found: dict[int, tuple[str, str]] = {}
        columns = (table.column(name).to_pylist() for name in table.schema.names)
        for index, prompt, row in zip(*columns, strict=True):
            if index not in found:
                found[index] = (prompt, _task(row))
        return found

    def texts(self, indices: Sequence[int]) -> dict[tuple[str, float, int], str]:
        """Label, temperature and prompt -> the answer, for some prompts."""
        names = ("model", "temperature", "best_of", "prompt_index", "answer")
        wanted = {*indices}
        return {
            (_label(row), float(row["temperature"]), row["prompt_index"]): str(row["answer"])
            for row in _columns(self.file, *names).to_pylist()
            if row["prompt_index"] in wanted
        }


def read_answers(exam: Exam) -> Answers | str:
    """The answers of an evaluation, or why there are none."""
    file = exam.stage.home / "artifact" / "answers.parquet"
    if not file.is_file():
        return "the evaluation's answers.parquet is not there"
    import pyarrow as arrow

    try:
        rows = _columns(file, *COLUMNS).to_pylist()
    except (OSError, arrow.ArrowException) as error:
        return f"the evaluation's answers.parquet cannot be read ({type(error).__name__})"
    grouped: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((_label(row), float(row["temperature"])), []).append(row)
    sheets = tuple(Sheet(*key, tuple(found)) for key, found in grouped.items())
    return Answers(file, sheets)


def _columns(file: Path, *names: str) -> Any:
    # `read_table` would import pandas, which takes longer than drawing the page.
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        return opened.read(columns=list(names))


def _label(row: Mapping[str, Any]) -> str:
    best_of = row["best_of"]
    return str(row["model"]) if best_of is None else f"{row['model']} best-of-{best_of}"


def _task(row: str | None) -> str:
    try:
        found = json.loads(row or "{}")
    except ValueError:
        return ""
    return str(found.get("task") or "") if isinstance(found, dict) else ""


# --- side by side ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One model's answer in the comparison."""

    label: str
    text: Markup
    against: str | None
    """The model whose answer the marks compare with."""
    facts: str
    ended: bool


@dataclass(frozen=True)
class Comparison:
    """A prompt and what every model answered."""

    task: str
    turns: tuple[tuple[str, str], ...]
    answers: tuple[Answer, ...]
    change: float | None
    """Score of the final model minus the baseline's."""


@dataclass(frozen=True)
class SideBySide:
    """What the section shows."""

    temperature: float
    even: tuple[Comparison, ...]
    lost: tuple[Comparison, ...]
    gained: tuple[Comparison, ...]


def side_by_side(run: Run, exam: Exam, answers: Answers) -> SideBySide:
    """Answers at the lowest temperature, where chance plays the smallest part."""
    at = min(sheet.temperature for sheet in answers.sheets)
    labels = [label for label in exam.labels if answers.sheet(label, at)]
    change = _changes(exam, answers, at)
    order = sorted(change, key=lambda index: change[index])
    lost = [index for index in order if change[index] < 0][:EXTREMES]
    gained = [index for index in reversed(order) if change[index] > 0][:EXTREMES]
    even = _evenly(answers.prompts)
    texts = answers.texts([*even, *lost, *gained])
    before = {label: _compared_with(run, exam, label, labels) for label in labels}

    def compare(index: int) -> Comparison:
        prompt, task = answers.prompts[index]
        found = []
        for label in labels:
            sheet = answers.sheet(label, at)
            row = (
                next((r for r in sheet.rows if r["prompt_index"] == index), None) if sheet else None
            )
            text = texts.get((label, at, index))
            if row is None or text is None:
                continue
            old = texts.get((before[label] or "", at, index))
            marked = _shown(text) if old is None else marks(old, text)
            against = before[label] if old is not None else None
            found.append(Answer(label, marked, against, _facts(row), bool(row["ended"])))
        return Comparison(task, tuple(_turns(prompt)), tuple(found), change.get(index))

    return SideBySide(at, *(tuple(map(compare, places)) for places in (even, lost, gained)))


def _changes(exam: Exam, answers: Answers, at: float) -> dict[int, float]:
    """Prompt -> by how much the final model's answer is better than the baseline's."""
    final, base = answers.sheet(exam.final, at), answers.sheet(exam.baseline, at)
    if final is None or base is None or exam.final == exam.baseline:
        return {}
    was = {row["prompt_index"]: row[exam.part] for row in base.rows}
    return {
        row["prompt_index"]: row[exam.part] - was[row["prompt_index"]]
        for row in final.rows
        if row[exam.part] is not None and was.get(row["prompt_index"]) is not None
    }


def _evenly(prompts: Mapping[int, tuple[str, str]]) -> list[int]:
    """Prompts by their place alone: task by task in turn, spread over each task's prompts."""
    tasks: dict[str, list[int]] = {}
    for index, (_, task) in sorted(prompts.items()):
        tasks.setdefault(task, []).append(index)
    each = -(-SHOWN // max(len(tasks), 1))
    picked = [found[:: max(len(found) // each, 1)][:each] for found in tasks.values()]
    turns = [row[place] for place in range(each) for row in picked if place < len(row)]
    return turns[:SHOWN]


def _compared_with(run: Run, exam: Exam, label: str, labels: Sequence[str]) -> str | None:
    """The model that a model was trained from, as far as it is in the table; else the one before it."""
    place = labels.index(label)
    row = next((r for r in exam.results["rows"] if r["label"] == label), None)
    ours = exam.stage.models
    if place == 0 or row is None or (ours and exam.made_by(label) is None):
        return None
    if row.get("best_of") is not None and str(row["model"]) in labels:
        return str(row["model"])
    stage = run.stage(exam.made_by(label) or "")
    made = {source: name for name, source in ours.items()}
    parents = [made[need] for need in (stage.needs if stage else ()) if made.get(need) in labels]
    return parents[0] if parents else labels[place - 1]


def _facts(row: Mapping[str, Any]) -> str:
    parts = [f"{name} {number(row[name])}" for name in ("score", "reward") if row[name] is not None]
    return " · ".join([*parts, f"{row['tokens']} tokens"])


def _turns(prompt: str) -> Iterator[tuple[str, str]]:
    try:
        turns = json.loads(prompt)
    except ValueError:
        turns = None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        yield "", _cut(prompt)
        return
    for turn in turns:
        yield str(turn.get("role") or ""), _cut(turn_text(turn))


def _cut(text: str) -> str:
    rest = len(text) - LONGEST
    return text if rest <= 0 else f"{text[:LONGEST]} … ({rest:,} more characters)"


def _shown(text: str) -> Markup:
    return escape(clean(_cut(text)))


def marks(old: str, new: str) -> Markup:
    """`new` with the words that `old` does not have in `<ins>`, and what it left out in `<del>`.

    Texts are made harmless before they are taken apart, so that no mark can break an escape.
    """
    before, after = (list(filter(None, WORDS.findall(clean(_cut(text))))) for text in (old, new))
    if max(len(before), len(after)) > MOST_WORDS:
        return _shown(new)
    keys = [[word.strip() for word in words] for words in (before, after)]
    match = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    if match.ratio() < ALIKE:
        return _shown(new)
    parts = []
    for what, old_from, old_to, from_, to in match.get_opcodes():
        gone, come = "".join(before[old_from:old_to]), "".join(after[from_:to])
        if what == "equal":
            parts.append(escape(come))
            continue
        bare = come.lstrip()
        parts.append(escape(come[: len(come) - len(bare)]))
        parts.append(Markup("<del>{}</del>").format(gone.strip()) if gone.strip() else Markup())
        parts.append(Markup("<ins>{}</ins>").format(bare) if bare else Markup())
    return Markup("").join(parts)
