"""The results of `align eval` as tables for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from align.report.progress import duration, short
from align.report.terminal import sanitise

Results = Mapping[str, Any]


def results_view(results: Results) -> Group:
    """All tables, with what has to be known to read them."""
    views: list[Any] = [main_table(results)]
    if results["tasks"]:
        views.append(task_table(results))
    if any(row["refusals"] for row in results["rows"]):
        views.append(refusal_table(results))
    return Group(*views, *(Text(note, style="dim") for note in _notes(results)))


def main_table(results: Results) -> Table:
    """One row per model and temperature."""
    rows = results["rows"]
    title = f"{results['prompts']} prompts, {results['confidence']:.0%} intervals"
    table = Table(title=title)
    columns = ["model", "T"]
    columns += ["score", *_parts(rows)] if results["judge"] else []
    columns += ["reward"] if results["reward_model"] else []
    columns += ["KL"] if results["reference"] else []
    columns += ["ended", "repeats", "tokens", "time"]
    columns += [f"against {results['baseline']}"] if results["baseline"] else []
    for at, column in enumerate(columns):
        table.add_column(Text(sanitise(column)), justify="left" if at == 0 else "right")
    for row in rows:
        cells = [row["label"], f"{row['temperature']:g}"]
        if results["judge"]:
            cells += [_interval(row["scores"]["score"])]
            cells += [f"{row['scores'][part]['mean']:.3f}" for part in _parts(rows)]
        cells += [_interval(row["reward"])] if results["reward_model"] else []
        cells += [_divergence(row)] if results["reference"] else []
        cells += [f"{row['ended']['mean']:.1%}", f"{row['duplicates']:.1%}"]
        cells += [short(row["tokens_in_all"]), duration(row["seconds"])]
        cells += [_difference(row)] if results["baseline"] else []
        table.add_row(*(Text(sanitise(cell)) for cell in cells))
    return table


def task_table(results: Results) -> Table:
    """Score, and correctness where the judge gives it, by task: what a mean over tasks hides."""
    correct = any("correct" in row["scores"] for row in results["rows"])
    table = Table(title="score / correct by task" if correct else "score by task")
    for name in ("model", "T"):
        table.add_column(name)
    for task, count in results["tasks"].items():
        table.add_column(Text(f"{sanitise(task)} ({count})"), justify="right")
    for row in results["rows"]:
        cells = [row["label"], f"{row['temperature']:g}"]
        for found in row["tasks"].values():
            parts = [p for p in ("score", "correct") if p in found["scores"]]
            cells.append(" / ".join(f"{found['scores'][part]['mean']:.2f}" for part in parts))
        table.add_row(*(Text(sanitise(cell)) for cell in cells))
    return table


def refusal_table(results: Results) -> Table:
    """How often prompts are refused that should be, and that should not."""
    table = Table("model", "T", "unsafe refused", "safe refused", title="refusals")
    for row in results["rows"]:
        sides = row["refusals"] or {}
        shares = [_interval(sides.get(side)) for side in ("unsafe", "safe")]
        table.add_row(Text(sanitise(row["label"])), f"{row['temperature']:g}", *map(Text, shares))
    return table


def _parts(rows: Any) -> list[str]:
    """Parts of the verdict beside the score that get a column: as many as fit."""
    return [part for part in rows[0]["scores"] if part != "score"][:3]


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _divergence(row: Mapping[str, Any]) -> str:
    return "-" if row["kl"] is None else f"{row['kl']['k1']['mean']:.3f}"


def _difference(row: Mapping[str, Any]) -> str:
    if row["difference"] is None:
        return "-"
    found = row["difference"]["scores"].get("score") or row["difference"]["reward"]
    return "-" if found is None else f"{found['mean']:+.3f}, p {_p(found['p'])}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _notes(results: Results) -> list[str]:
    notes = [results["notes"]["judge"]] if results["judge"] else []
    return notes + ([f"KL is {results['notes']['kl']}"] if results["reference"] else [])
