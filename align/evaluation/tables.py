"""The results of `align eval` as tables for a terminal of 80 to 100 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from align.report.tables import interval
from align.report.terminal import sanitise

Results = Mapping[str, Any]
Row = Mapping[str, Any]


def results_view(results: Results) -> Group:
    """All tables, with what has to be known to read them."""
    tables = [main_table(results)]
    if any(len(row["scores"]) > 1 for row in results["rows"]):
        tables.append(parts_table(results))
    if results["judge"] and results["tasks"]:
        tables.append(task_table(results))
    if any(row["refusals"] for row in results["rows"]):
        tables.append(refusal_table(results))
    return Group(*tables, *(Text(note) for note in _notes(results)))


def main_table(results: Results) -> Table:
    """One row per model and temperature."""
    title = f"{results['prompts']} prompts, {results['confidence']:.0%} intervals"
    heads = ["score"] if results["judge"] else []
    heads += ["reward"] if results["reward_model"] else []
    heads += ["KL"] if results["reference"] else []
    heads += ["ended"]
    heads += [f"against {results['baseline']}"] if results["baseline"] else []
    rows = [(row, _main_cells(results, row)) for row in results["rows"]]
    return _table(title, heads, rows)


def _main_cells(results: Results, row: Row) -> list[str]:
    cells = [interval(row["scores"]["score"])] if results["judge"] else []
    if results["reward_model"]:
        # Where nothing else scores, the reward is what counts.
        cells.append(_mean(row["reward"]) if results["judge"] else interval(row["reward"]))
    if results["reference"]:
        cells.append(_mean(row["kl"] and row["kl"]["k1"]))
    cells.append(f"{row['ended']['mean']:.0%}")
    return cells + ([_difference(row)] if results["baseline"] else [])


def parts_table(results: Results) -> Table:
    """The mean of every part of the judge's verdict."""
    heads = list(results["rows"][0]["scores"])
    rows = [(row, [_mean(row["scores"][part]) for part in heads]) for row in results["rows"]]
    return _table("parts of the score", heads, rows)


def task_table(results: Results) -> Table:
    """Correctness by task (the score where the judge knows no more): what a mean hides."""
    part = "correct" if "correct" in results["rows"][0]["scores"] else "score"
    heads = [f"{task} ({count})" for task, count in results["tasks"].items()]
    rows = [
        (row, [_short(row["tasks"][task]["scores"][part]["mean"]) for task in results["tasks"]])
        for row in results["rows"]
    ]
    return _table(f"{part} by task", heads, rows)


def refusal_table(results: Results) -> Table:
    """How often prompts are refused that should be, and that should not."""
    rows = [
        (row, [interval((row["refusals"] or {}).get(side)) for side in ("unsafe", "safe")])
        for row in results["rows"]
    ]
    return _table("share of refusals", ["of unsafe prompts", "of safe prompts"], rows)


def _table(title: str, heads: Sequence[str], rows: Sequence[tuple[Row, Sequence[str]]]) -> Table:
    close = (0, 1, 0, 0)
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=close, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for head in ("T", *heads):
        table.add_column(Text(sanitise(head)), justify="right", no_wrap=" " not in head)
    for row, cells in rows:
        every = [row["label"], f"{row['temperature']:g}", *cells]
        table.add_row(*(Text(sanitise(cell)) for cell in every))
    return table


def _short(mean: float) -> str:
    return f"{mean:.2f}".removeprefix("0")


def _mean(found: Row | None) -> str:
    return "" if found is None else f"{found['mean']:.3f}"


def _difference(row: Row) -> str:
    if row["difference"] is None:
        return ""
    found = row["difference"]["scores"].get("score") or row["difference"]["reward"]
    p = "p < .001" if found["p"] < 0.001 else f"p {found['p']:.3f}".replace("0.", ".")
    return f"{found['mean']:+.3f}, {p}"


def _notes(results: Results) -> list[str]:
    notes = [results["notes"]["judge"]] if results["judge"] else []
    return notes + ([f"KL is {results['notes']['kl']}"] if results["reference"] else [])
