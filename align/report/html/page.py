"""The page: what the template gets, and how it is rendered so that no text can become markup.

Three locks, each enough alone: every value is escaped by the template engine, its controls are made
visible before that, and the page's own policy allows no script, no request and no style but one.
"""

import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from align import __version__
from align.report.html import charts
from align.report.html.answers import Answers, SideBySide, read_answers, side_by_side
from align.report.html.cost import Cost, cost
from align.report.html.curves import FIRST, curves
from align.report.html.exam import Exam, exams
from align.report.html.findings import findings
from align.report.html.gather import Run, Stage, short_path
from align.report.html.graph import MARKS, lineage, node_facts
from align.report.html.race import colours, race
from align.report.html.tasks import task_table
from align.report.html.text import clean, cut, interval, number, percent, signed, temperature
from align.report.html.verdict import verdict
from align.report.progress import duration, short
from align.report.terminal import visible
from align.secrets import hide_tokens

HERE = Path(__file__).parent

TICKED = re.compile(r"`([^`]+)`")


def render(run: Run, stamp: str) -> str:
    """The page of a run as one self-contained HTML file.

    Args:
        run: what lies in the folder.
        stamp: sha256 of what the page is made of.
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    digest = b64encode(sha256(style.encode()).digest()).decode()
    page = (
        _environment()
        .get_template("page.html")
        .render(
            _context(run),
            stamp=stamp,
            style=Markup(style),
            style_digest=digest,
        )
    )
    # What is hidden in an escape or an attribute by a way nobody thought of ends here.
    # Only tokens themselves: what follows `password=` may be markup of the page by now.
    return visible(hide_tokens(page, "&lt;secret&gt;"))


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        cut,
        number,
        signed,
        percent,
        interval,
        temperature,
        duration,
        short,
        short_path,
        ticked,
    )
    made.filters.update({item.__name__: item for item in filters})
    made.filters["value"] = _value
    return made


def _shown(value: Any) -> Any:
    """Every value of the template passes here before it is escaped."""
    if value is None:
        return ""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def ticked(text: str) -> Markup:
    """Text whose `names` are set as code."""
    safe = str(escape(clean(text)))
    return Markup(TICKED.sub(r"<code>\1</code>", safe))


def _value(value: Any) -> str:
    """A value of a recipe on one line."""
    if isinstance(value, str):
        return short_path(value) if value else '""'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, default=str)


# --- what the template gets ------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A drawing with a title and a sentence on how to read it."""

    title: str
    image: Markup
    note: str


def _context(run: Run) -> dict[str, Any]:
    """Every section. One whose file is broken is left out, and the page says so."""
    broken: list[str] = []

    def section(name: str, draw: Callable[[], Any], nothing: Any = None) -> Any:
        try:
            return draw()
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            broken.append(f"{name} cannot be drawn ({type(error).__name__}: {error})")
            return nothing

    measured = section("the scores", lambda: exams(run), [])
    exam = measured[-1] if measured else None
    colour = section("the colours", lambda: colours(exam), {}) if exam else {}
    answers: Answers | str = "no evaluation left results"
    if exam:
        answers = section("the answers", lambda: read_answers(exam), "they cannot be read")
    shown = [stage for stage in run.stages if stage.state != "off"]
    found = {
        "version": __version__,
        "run": run,
        "exam": exam,
        "marks": MARKS,
        "first_curves": FIRST,
        "verdict": section("the verdict", lambda: verdict(run, exam)) or verdict(run, None),
        "findings": section("the findings", lambda: findings(run, exam), []),
        "race": section("the scores", lambda: race(exam)) if exam else None,
        "lineage": section(
            "the lineage", lambda: lineage(run, {s.name: node_facts(s) for s in run.stages})
        ),
        "tasks": section("the tasks", lambda: task_table(exam, colour)) if exam else None,
        "side_by_side": section("the answers", lambda: _side_by_side(run, exam, answers)),
        "distributions": section(
            "the distributions", lambda: list(_distributions(run, exam, answers, colour)), []
        ),
        "samples": section("the samples", lambda: list(_samples(run)), []),
        "rewards": section("the reward model", lambda: list(_rewards(run)), []),
        "stages": [one for stage in shown if (one := section(stage.name, partial(_stage, stage)))],
        "recipe": [_recipe(stage) for stage in run.stages if stage.settings],
        "cost": section("the cost", lambda: cost(run)) or Cost((), 0.0, 0, (), ()),
    }
    sections = ("tasks", "distributions", "rewards", "samples")
    anchors = {{"rewards": "reward-model"}.get(name, name) for name in sections if found[name]}
    anchors |= {"lengths", "frontier"} if found["distributions"] else set()
    found["anchors"] = anchors | {f"stage-{stage.name}" for stage in shown}
    gaps = section("what is missing", lambda: list(_gaps(run, exam, answers)), [])
    return found | {"gaps": [*gaps, *dict.fromkeys(broken)]}


def _side_by_side(run: Run, exam: Exam | None, answers: Answers | str) -> SideBySide | None:
    if exam is None or isinstance(answers, str) or not answers.sheets:
        return None
    return side_by_side(run, exam, answers)


def _distributions(
    run: Run, exam: Exam | None, answers: Answers | str, colour: Mapping[str, str]
) -> Iterator[Card]:
    if exam is None:
        return
    at = exam.temperatures[0]
    if not isinstance(answers, str):
        sheets = [sheet for label in exam.labels if (sheet := answers.sheet(label, at))]
        drawn = charts.ridges(sheets, "reward", "reward", colour)
        if drawn:
            note = f"Reward of every answer {temperature(at)}; the upright line is the mean."
            yield Card("Rewards, model by model", drawn, note)
        drawn = charts.ridges(sheets, "tokens", "tokens per answer", colour)
        if drawn:
            note = f"Tokens of every answer {temperature(at)}, with the stop token."
            yield Card("Lengths", drawn, note)
    found = charts.frontier(run, exam, colour)
    if found:
        note = "High and left is good: much reward, little distance. " + "; ".join(found[1])
        yield Card("Reward against KL", found[0], note)


def _samples(run: Run) -> Iterator[Card]:
    for stage in run.of_kind("sample"):
        report = stage.artifact("report.json")
        drawn = charts.histogram(stage)
        if drawn:
            count = report.get("completions", 0)
            note = f"Scores of {count:,} samples of {report.get('prompts', 0):,} prompts."
            yield Card(f"{stage.name}: scores", drawn, note)
        drawn = charts.growth(stage)
        if drawn:
            note = "What the best (or the median) of N samples would bring; exact over all subsets."
            yield Card(f"{stage.name}: best of N", drawn, note)


def _rewards(run: Run) -> Iterator[tuple[Stage, Mapping[str, Any], list[Card]]]:
    for stage in run.of_kind("reward"):
        report = stage.artifact("reward_report.json")
        if not report:
            continue
        cards = []
        drawn = charts.calibration(report)
        if drawn:
            error = number((report.get("calibration") or {}).get("expected_error"))
            note = f"On the dashed line it is as right as it says; expected error {error}."
            cards.append(Card("Calibration", drawn, note))
        drawn = charts.by_margin(report)
        if drawn:
            note = "Pairs that are further apart should be easier. Dashed: a coin."
            cards.append(Card("Accuracy by margin", drawn, note))
        yield stage, report, cards


def _stage(stage: Stage) -> dict[str, Any]:
    rows = (stage.lineage.get("data") or {}).get("train") or {}
    summary = {
        key: value
        for key, value in stage.summary.items()
        if key not in ("stage", "name", "alarms") and isinstance(value, int | float | str)
    }
    return {
        "stage": stage,
        "kind": node_facts(stage)[0],
        "figure": node_facts(stage)[1],
        "curves": curves(stage),
        "summary": summary,
        "rows": rows,
        "alarms": stage.metrics.alarms,
        "inputs": list(_inputs(stage)),
    }


def _inputs(stage: Stage) -> Iterator[tuple[str, str, str]]:
    """What a stage read: key, name, and what is known of it."""
    for facts in stage.lineage.get("inputs", []):
        known = [str(facts[key]) for key in ("split",) if facts.get(key)]
        known += [f"{facts['rows']:,} rows"] if isinstance(facts.get("rows"), int) else []
        known += [f"sha256 {str(facts['sha256'])[:12]}"] if facts.get("sha256") else []
        known += [f"revision {facts['revision']}"] if facts.get("revision") else []
        yield str(facts.get("key")), short_path(str(facts.get("path"))), ", ".join(known)


def _recipe(stage: Stage) -> dict[str, Any]:
    given = [row for row in stage.settings if row.origin != "default"]
    rest = [row for row in stage.settings if row.origin == "default"]
    return {"stage": stage, "given": given, "rest": rest}


def _gaps(run: Run, exam: Exam | None, answers: Answers | str) -> Iterator[str]:
    """What a complete report has and this one lacks, and why."""
    for stage in run.stages:
        if stage.state == "missing":
            yield f"`{stage.name}` is not there: {'; '.join(stage.reasons) or 'it has not run'}"
        elif stage.state == "off":
            yield f"`{stage.name}` is optional and was not asked for (`--with {stage.name}`)"
        elif not stage.metrics.steps and stage.kind in ("sft", "reward", "dpo", "ppo"):
            yield f"`{stage.name}` has no curves: metrics.jsonl holds no step"
        if stage.metrics.torn:
            yield f"`{stage.name}`: {stage.metrics.torn} lines of metrics.jsonl cannot be read"
    kinds: Sequence[tuple[str, str, str]] = (
        ("reward", "reward_report.json", "calibration and accuracy of the reward model"),
        ("sample", "report.json", "scores of the samples and the best of N"),
    )
    for kind, name, what in kinds:
        for stage in run.of_kind(kind):
            if stage.state in ("complete", "changed") and not stage.artifact(name):
                yield f"`{stage.name}`: no {what}, because artifact/{name} is not there"
    if exam is None:
        yield "no scores, answers or distributions: no evaluation left results"
        return
    if isinstance(answers, str):
        yield f"no answers side by side and no distributions: {answers}"
    if not exam.results.get("reward_model"):
        yield "no rewards of the answers: the evaluation names no reward_model"
    if not exam.results.get("reference"):
        yield "no reward against KL: the evaluation names no reference"
    if not exam.results.get("tasks"):
        yield "no results by task: the evaluation's rows have no column `task`"
