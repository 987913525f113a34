"""A comparison of two models for people: in the terminal, and as Markdown with the telling answers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from align.data.exact import turn_text
from align.report.tables import interval
from align.report.terminal import sanitise

EXAMPLES = 3
"""Prompts shown for each side: those it wins by most."""

Summary = Mapping[str, Any]


def comparison_view(summary: Summary) -> Group:
    """The summary for a terminal."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    heads, rows = _table(summary)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text(sanitise(cell)) for cell in row))
    return Group(table, *(Text(sanitise(line)) for line in sentences(summary)))


def _table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    heads, rows = ["model"], []
    first = summary["means"]["A"]
    columns = [name for name in ("score", "reward", "ended", "tokens") if first[name] is not None]
    heads += columns + (["wins"] if summary["decided_by"] else [])
    for side, name in summary["models"].items():
        row = [f"{side}  {name}"]
        for column in columns:
            found = summary["means"][side][column]
            brief = f"{found['mean']:.0%}" if column == "ended" else f"{found['mean']:.1f}"
            row.append(interval(found) if column in ("score", "reward") else brief)
        rows.append(row + ([str(summary["verdicts"][side])] if summary["decided_by"] else []))
    return heads, rows


def sentences(summary: Summary) -> list[str]:
    """What came out, in words."""
    by, prompts = summary["decided_by"], summary["prompts"]
    level = f"{summary['settings']['confidence']:.0%} intervals"
    if by is None:
        return [
            f"{prompts} prompts; nothing scored the answers: --judge NAME or --reward-model RUN do"
        ]
    scorer = summary["judge"] if by == "score" else "the reward model"
    found = [f"{prompts} prompts, decided by {scorer}, {level}; {summary['note']}"]
    rate, ties = summary["win_rate"], summary["verdicts"]["tie"]
    if rate is None:
        found.append(f"no prompt is decided: {ties} ties")
    else:
        won = f"A wins {interval(rate)} of the {rate['n']} decided prompts"
        found.append(f"{won}; {ties} ties ({summary['same_text']} with the same text)")
    for name, difference in summary["difference"].items():
        if difference is not None:
            p = "p < .001" if difference["p"] < 0.001 else f"p {difference['p']:.3f}"
            found.append(f"A - B in {name}: {interval(difference)}, paired, {p}")
    return found


def markdown(summary: Summary, rows: Sequence[Mapping[str, Any]]) -> str:
    """The summary and the prompts that each side wins by most."""
    names = summary["models"]
    heads, cells = _table(summary)
    lines = [f"# {_inline(names['A'])} against {_inline(names['B'])}", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    lines += ["| " + " | ".join(_inline(cell) for cell in row) + " |" for row in cells]
    lines += ["", *(f"{_inline(line)}  " for line in sentences(summary)), ""]
    settings = ", ".join(f"{key} {value}" for key, value in summary["settings"].items())
    lines += [f"Drawn with {settings}. All answers: `{_inline(summary['output'])}`.", ""]
    if summary["decided_by"] is None:
        return "\n".join(lines + _examples("The first prompts", rows[:EXAMPLES]))
    order = sorted(rows, key=lambda row: row["difference"])
    for side, ranked in (("A", order[::-1]), ("B", order)):
        won = [row for row in ranked if row["verdict"] == side][:EXAMPLES]
        lines += _examples(f"Where {side} wins by most", won)
    return "\n".join(lines)


def _examples(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"## {title}", ""] if rows else []
    for row in rows:
        asked = row["prompt"]
        if not isinstance(asked, str):
            asked = "\n".join(f"{turn['role']}: {turn_text(turn)}" for turn in asked)
        lines += [f"### Prompt {row['index'] + 1}", "", *_block(asked), ""]
        for side in ("a", "b"):
            found = row[side]
            marks = [
                f"{key} {found[key]:.3g}" for key in ("score", "reward") if found[key] is not None
            ]
            marks += [] if found["ended"] else ["never ended"]
            head = f"{side.upper()}, {_inline(found['model'])}"
            lines += [head + (f" ({', '.join(marks)}):" if marks else ":"), ""]
            lines += [*_block(found["answer"]), ""]
    return lines


def _block(text: str) -> list[str]:
    """Text of a model or of data as a code block that it cannot close."""
    clean = sanitise(text)
    longest = max((len(run) for run in re.findall(r"`+", clean)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", clean, fence]


def _inline(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", sanitise(text).replace("\n", " "))
