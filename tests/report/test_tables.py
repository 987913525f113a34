"""The final table fits a terminal of 80 columns and shows nothing that it does not know."""

from pathlib import Path

import pytest
from rich.console import Console

from align.config.fields import config_class
from align.durable import read_json, write_json
from align.report import tables
from align.report.tables import (
    final_table,
    interval,
    key_metrics,
    markdown,
    status_table,
    table_rows,
    write_table,
)
from align.status import Plan, StageStatus


def mean(value: float) -> dict[str, float]:
    return {"mean": value, "low": value - 0.021, "high": value + 0.019}


def result(model: str, temperature: float, score: float, **more: object) -> dict[str, object]:
    return {
        "label": model,
        "model": model,
        "temperature": temperature,
        "scores": {"score": mean(score)},
        "reward": mean(-1.25),
        "kl": {"k1": mean(0.1234)},
    } | more


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    def made(kind: str, name: str, **more: object) -> object:
        given = {"output_dir": str(tmp_path / name)} | more
        return config_class(kind).model_validate(given)

    data = {"dataset_name": "rows"}
    model = {"model_name_or_path": "$sft"}
    configs = {
        "sft": made("sft", "sft", model={"model_name_or_path": "org/base"}, data=data),
        "reward": made("reward", "reward", model=model, data=data),
        "best": made("sample", "best", model=model, data=data, scorer={"reward_model": "$reward"}),
        "rs": made("sft", "rs", model=model, data=data),
        "eval": made(
            "eval", "eval", models={"base": "org/base", "sft": "$sft", "policy": "$rs"}, data=data
        ),
    }
    plan = Plan(tmp_path, "pipeline.yaml", configs, tuple(configs))
    notes = {
        "sft": {"tokens": 30_252, "seconds": 61.4, "loss": 0.8},
        "reward": {"tokens": 8900, "seconds": 6.0, "accuracy": 0.8431, "accuracy_from": "held-out"},
        "best": {"tokens": 2000, "seconds": 20.0, "score": 0.5, "best_score": 1.75},
        "rs": {"tokens": 1600, "seconds": 4.0},
        "eval": {"tokens": 4700, "seconds": 11.0},
    }
    for name, note in notes.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "summary.json", note)
    (tmp_path / "eval" / "artifact").mkdir()
    rows = [
        result(model, temperature, score)
        for model, score in (("base", 0.142), ("sft", 0.612), ("policy", 0.71))
        for temperature in (1.0, 0.0)
    ]
    rows.insert(4, result("sft", 1.0, 0.8, label="sft best-of-16", best_of=16, kl=None))
    results = {"judge": "tiny_world", "prompts": 400, "confidence": 0.95, "reference": "sft"}
    write_json(tmp_path / "eval" / "artifact" / "results.json", results | {"rows": rows})
    return plan


def test_rows_follow_the_pipeline_and_costs_go_to_the_stage_that_caused_them(plan: Plan) -> None:
    rows = table_rows(plan)
    labels = ["base", "sft", "sft best-of-16", "reward", "best", "policy (rs)", "eval"]
    assert [row["label"] for row in rows] == labels
    costs = [(row.get("tokens"), row.get("seconds")) for row in rows]
    assert costs[:3] == [(None, None), (30_252, 61.4), (None, None)]
    assert costs[5] == (1600, 4.0)
    assert rows[1]["T=1"]["score"]["mean"] == 0.612
    assert rows[1]["greedy"]["score"]["mean"] == 0.612
    assert rows[2]["kl"] is None
    assert rows[3]["note"] == "accuracy 0.843"
    assert rows[4]["note"] == "best 1.75, mean 0.5"


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits(plan: Plan, width: int, monkeypatch) -> None:
    screen = Console(width=width, record=True)
    monkeypatch.setattr(tables, "console", lambda *, results=False: screen)
    screen.print(final_table(table_rows(plan)))
    lines = screen.export_text().splitlines()
    assert max(map(len, lines)) <= width
    sft = next(line for line in lines if line.startswith("sft "))
    bounds = "[.59 .63]" if width == 80 else "[.591 .631]"
    assert sft.count(f"0.612 {bounds}") == 2
    assert sft.split()[-2:] == ["30.3k", "1:01"]
    assert "…" not in screen.export_text()


def test_the_table_is_written_as_markdown_and_json(plan: Plan) -> None:
    text = write_table(plan).read_text(encoding="utf-8")
    assert "| sft | 0.612 [.591 .631] | 0.612 [.591 .631] | -1.25 | 0.123 | 30.3k | 1:01 |" in text
    assert "tiny_world on 400 held-out prompts, 95% intervals; KL to sft" in text
    assert "all stages together: 1:42" in text
    kept = read_json(plan.output / "table.json")
    assert kept["seconds"] == pytest.approx(102.4)
    assert len(kept["rows"]) == 7


def test_a_pipeline_without_evaluation_still_has_a_table(plan: Plan) -> None:
    (plan.output / "eval" / "artifact" / "results.json").unlink()
    assert [row["label"] for row in table_rows(plan)] == ["sft", "reward", "best", "rs", "eval"]


def test_names_from_a_recipe_cannot_break_the_table() -> None:
    text = markdown([{"label": "a|b\n[red]\x1b[2J"}], [])
    assert "| a\\|b [red]\\x1b[2J |" in text


def test_intervals_are_short_and_keep_their_sign() -> None:
    assert interval({"mean": 0.5, "low": -0.25, "high": 1.25}) == "0.500 [-.250 1.250]"
    assert interval(None) == ""


def test_key_metrics_are_numbers_and_few() -> None:
    summary = {"tokens": 12_345, "loss": 0.51234, "accuracy": None, "score": 1.0, "prompts": 3}
    assert key_metrics(summary) == [("loss", "0.5123"), ("score", "1"), ("prompts", "3")]


def test_the_status_shows_states_reasons_and_sizes() -> None:
    stages = [
        StageStatus("sft", "sft", "complete", "x", size=12_345, summary={"seconds": 61.0}),
        StageStatus("rs", "sft", "partial", "x", needs=("sft",), step=40),
        StageStatus("dpo", "dpo", "failed", "x", reasons=("[/oops] \x1b[2J",)),
    ]
    screen = Console(width=100, record=True)
    screen.print(status_table(stages))
    text = screen.export_text()
    for words in ("12.3 kB", "1:01", "partial (step 40)", "[/oops] \\x1b[2J"):
        assert words in text
