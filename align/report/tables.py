"""The tables of a pipeline: how its stages stand, and what came out at the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from align.config.references import references
from align.durable import read_json, write_json, write_text
from align.report.progress import duration, short, size
from align.report.terminal import console, sanitise, say
from align.runs import output_path
from align.status import Plan, StageStatus

COLOURS = {
    "complete": "green",
    "changed": "yellow",
    "partial": "yellow",
    "damaged": "red",
    "foreign": "red",
    "failed": "red",
    "missing": "",
    "off": "dim",
}

KEYS = (
    *("loss", "accuracy", "score", "best_score", "distance", "svd_error"),
    *("pairs", "demonstrations", "prompts", "tokens"),
)
"""Notes of a stage that are shown, the most telling first."""

HEADS = ("stage", "score, T = 1", "score, greedy", "reward", "KL", "tokens", "time")

WIDE = 88
"""Columns from which the intervals of the final table have three digits."""

Row = dict[str, Any]


def number(value: float) -> str:
    """Three digits behind the point, fewer for large numbers."""
    return short(value) if abs(value) >= 1000 else f"{value:.4g}"


def key_metrics(summary: Mapping[str, Any], most: int = 3) -> list[tuple[str, str]]:
    """The first few notes of a run that are numbers, with their names in words."""
    found = [
        (key.replace("_", " "), number(summary[key]))
        for key in KEYS
        if isinstance(summary.get(key), int | float)
    ]
    return found[:most]


def status_table(stages: Sequence[StageStatus], *, runs: bool = False) -> Table:
    """One row per stage: state, what it builds on, size, time and key metrics.

    With `runs` the rows are runs of any pipeline, and have their kind in place of what they need.
    """
    table = Table(box=box.SIMPLE, pad_edge=False)
    first, third = ("run", "stage") if runs else ("stage", "from")
    for head in (first, "state", third, "size", "time", "metrics"):
        table.add_column(head, justify="right" if head in ("size", "time") else "left")
    for stage in stages:
        state: str = stage.state if stage.process is None else "running"
        state += "" if stage.step is None else f" (step {stage.step})"
        seconds = stage.summary.get("seconds")
        metrics = ", ".join(f"{key} {value}" for key, value in key_metrics(stage.summary))
        cells = (
            stage.name,
            Text(state, style=COLOURS[stage.state]),
            stage.kind if runs else ", ".join(stage.needs),
            size(stage.size) if stage.size else "",
            duration(seconds) if seconds is not None else "",
            "; ".join(stage.reasons[:3]) or metrics,
        )
        table.add_row(*(c if isinstance(c, Text) else Text(sanitise(c)) for c in cells))
    return table


def show_status(stages: Sequence[StageStatus], *, runs: bool = False) -> None:
    """Print the table of states (an answer: to stdout)."""
    console(results=True).print(status_table(stages, runs=runs))


def table_rows(plan: Plan) -> list[Row]:
    """One row per model of the last `eval` stage and per further stage, in the pipeline's order.

    A model's row takes tokens and seconds of the stage that its `$name` refers to. Models that no
    stage trained come first; a model's best-of-K row follows it, and costs what is not counted.
    """
    evals = [name for name in plan.chosen if plan.kind(name) == "eval"]
    results = _results(plan, evals[-1]) if evals else {}
    source = _sources(plan, evals[-1]) if evals else {}
    models: dict[str, list[Row]] = {}
    for found in results.get("rows", []):
        rows = models.setdefault(source.get(found["model"], ""), [])
        row = next((row for row in rows if row["label"] == found["label"]), None)
        if row is None:
            row = _model_row(found)
            rows.append(row)
        temperature = float(found["temperature"])
        row[f"T={temperature:g}" if temperature else "greedy"] = _scores(found)
    rows = models.pop("", [])
    for name in plan.chosen:
        summary = read_json(output_path(plan.configs[name]) / "summary.json") or {}
        cost = {"tokens": summary.get("tokens"), "seconds": summary.get("seconds")}
        made = models.get(name) or [{"label": name, "note": _note(plan.kind(name), summary)}]
        if name in models and made[0]["label"] != name:
            made[0]["label"] += f" ({name})"
        rows += [made[0] | cost | {"stage": name}, *made[1:]]
    return rows


def _results(plan: Plan, name: str) -> dict[str, Any]:
    return read_json(output_path(plan.configs[name]) / "artifact" / "results.json") or {}


def _sources(plan: Plan, name: str) -> dict[str, str]:
    """Name of a model in an `eval` stage -> the stage that made it."""
    return {
        str(found.path[1]): found.stage
        for found in references(plan.configs[name])
        if found.pattern == "models.*"
    }


def _model_row(found: Mapping[str, Any]) -> Row:
    return {"label": str(found["label"]), "kl": _mean((found.get("kl") or {}).get("k1"))}


def _scores(found: Mapping[str, Any]) -> Row:
    return {"score": (found.get("scores") or {}).get("score"), "reward": found.get("reward")}


def _mean(interval: Mapping[str, Any] | None) -> float | None:
    return None if interval is None else float(interval["mean"])


def _note(kind: str, summary: Mapping[str, Any]) -> str:
    """The key metric of a stage that leaves no policy."""
    accuracy, best = summary.get("accuracy"), summary.get("best_score")
    if kind == "average" and isinstance(summary.get("distance"), int | float):
        return f"of {summary.get('models')}, distance {summary['distance']:.3g}"
    if kind == "reward" and isinstance(accuracy, int | float):
        where = str(summary.get("accuracy_from", ""))
        return f"accuracy {accuracy:.3f}" + (f" ({where})" if where.startswith("train") else "")
    if kind == "sample" and isinstance(best, int | float):
        return f"best {best:.3g}, mean {summary.get('score', float('nan')):.3g}"
    return ""


def interval(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """`0.612 [.592 .631]`, or nothing."""
    if found is None:
        return ""
    low, high = (_bound(float(found[side]), digits) for side in ("low", "high"))
    return f"{float(found['mean']):.3f} [{low} {high}]"


def _bound(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _cells(row: Row, digits: int = 3) -> list[str]:
    drawn, greedy = row.get("T=1") or {}, row.get("greedy") or {}
    reward = _mean(drawn.get("reward") or greedy.get("reward"))
    tokens, seconds, kl = row.get("tokens"), row.get("seconds"), row.get("kl")
    return [
        row["label"],
        interval(drawn.get("score"), digits) or row.get("note", ""),
        interval(greedy.get("score"), digits),
        "" if reward is None else f"{reward:.3g}",
        "" if kl is None else f"{kl:.3g}",
        "" if tokens is None else short(tokens),
        "" if seconds is None else duration(seconds),
    ]


def seconds_in_all(rows: Sequence[Row]) -> float:
    """Time of all stages together, over all their attempts."""
    return sum(float(row.get("seconds") or 0.0) for row in rows)


def final_table(rows: Sequence[Row]) -> Table:
    """What came out, for a terminal of 80 columns or more."""
    digits = 3 if console(results=True).width >= WIDE else 2
    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for head in HEADS:
        left = head == HEADS[0] or head.startswith("score")
        table.add_column(head, justify="left" if left else "right")
    for row in rows:
        table.add_row(*(Text(sanitise(cell)) for cell in _cells(row, digits)))
    return table


def _explained(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """What has to be known to read the table."""
    lines = [f"all stages together: {duration(seconds_in_all(rows))}"]
    evals = [name for name in plan.chosen if plan.kind(name) == "eval"]
    found = _results(plan, evals[-1]) if evals else {}
    if found:
        what = f"score: {found['judge']}" if found.get("judge") else "no judge"
        lines.insert(
            0,
            f"{what} on {found['prompts']} held-out prompts, {found['confidence']:.0%} intervals"
            + (f"; KL to {found['reference']}, nats per answer" if found.get("reference") else ""),
        )
    return lines


def markdown(rows: Sequence[Row], lines: Sequence[str]) -> str:
    """The table as Markdown."""
    cells = [HEADS, ["---"] * len(HEADS), *map(_cells, rows)]
    table = "\n".join("| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in cells)
    return "\n\n".join([table, *lines]) + "\n"


def _escaped(cell: str) -> str:
    return sanitise(cell).replace("|", "\\|").replace("\n", " ")


def write_table(plan: Plan) -> Path:
    """Write table.md and table.json into the pipeline's folder."""
    rows = table_rows(plan)
    write_text(plan.output / "table.md", markdown(rows, _explained(plan, rows)))
    content = {"rows": rows, "seconds": round(seconds_in_all(rows), 3)}
    write_json(plan.output / "table.json", content)
    return plan.output / "table.md"


def show_table(plan: Plan) -> None:
    """Print the final table (an answer: to stdout)."""
    rows = table_rows(plan)
    console(results=True).print(final_table(rows), "")
    for line in _explained(plan, rows):
        say(line, results=True)
