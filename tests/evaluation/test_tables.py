"""Tables show what is in the results, within 100 columns, and nothing that steers a terminal."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from align.evaluation.tables import results_view


def interval(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "n": 9, "method": "bootstrap"}


def row(label: str, temperature: float, **more: Any) -> dict[str, Any]:
    return {
        "label": label,
        "temperature": temperature,
        "scores": {"score": interval(0.5), "correct": interval(0.75)},
        "reward": interval(1.25),
        "kl": {"k1": interval(2.5), "k3": interval(2.4)},
        "ended": interval(0.98),
        "duplicates": 0.04,
        "tokens_in_all": 12345,
        "seconds": 75.0,
        "tasks": {"fact": {"n": 5, "scores": {"score": interval(0.4), "correct": interval(1.0)}}},
        "refusals": {"unsafe": interval(0.9)},
        "difference": None,
    } | more


def results(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "prompts": 300,
        "tasks": {"fact": 300},
        "judge": "number",
        "reward_model": "rm",
        "reference": "sft",
        "baseline": "sft",
        "confidence": 0.95,
        "notes": {"judge": "note on the judge", "kl": "measured somehow"},
        "rows": list(rows),
    } | more


def shown(found: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(results_view(found))
    return console.export_text()


def difference(p: float) -> dict[str, Any]:
    found = {"mean": 0.123, "low": 0.1, "high": 0.2, "p": p, "n": 9, "test": "sign-flip"}
    return {"to": "sft", "scores": {"score": found}, "reward": None, "tasks": {}}


def test_everything_has_its_place():
    text = shown(results(row("sft", 1.0), row("dpo", 0.0, difference=difference(0.0001))))
    for words in (
        "300 prompts, 95% intervals",
        "0.500 [.450 .550]",
        "1.250",
        "2.500",
        "98%",
        "+0.123, p < .001",
        "fact (300)",
        "correct by task",
        " 1.00",
        "0.900 [.850 .950]",
        "note on the judge",
        "KL is measured somehow",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"judge": None}, "note on the judge"),
        ({"reward_model": None}, "reward"),
        ({"reference": None}, "KL"),
        ({"baseline": None}, "against"),
        ({"tasks": {}}, "by task"),
    ],
)
def test_what_was_not_asked_for_has_no_column(changes, gone):
    rows = [row("sft", 1.0, **({"scores": {}, "refusals": None} if "judge" in changes else {}))]
    assert gone not in shown(results(*rows, **changes))


def test_names_cannot_steer_the_terminal():
    text = shown(results(row("a\x1b]8;;x\x07[bold]", 0.0), tasks={}, baseline="[red]b"))
    assert "\x1b" not in text
    assert "[bold]" in text
    assert "against [red]b" in text
