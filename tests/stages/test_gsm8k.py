"""Real rows: GSM8K by a column mapping through inspect, sft, sample and eval, from the shipped recipes."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from align.config.load import load_stage
from align.data.inspection import inspect_stage
from align.runs import run_stage


def run(recipe: str, output: Path, *settings: str) -> Path:
    loaded = load_stage(f"gsm8k/{recipe}", [f"output_dir={output}", *settings])
    return run_stage(loaded.config, quiet=True) / "artifact"


def test_inspect_shows_the_answer_in_the_loss(capsys):
    inspect_stage(load_stage("gsm8k/sft").config, rows=2, as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert len(row["ids"]) == len(row["loss_mask"])
        assert 0 < sum(row["loss_mask"]) < len(row["ids"])
        assert row["loss_mask"][-1] == 1


@pytest.mark.slow
def test_real_rows_through_sft_sample_and_eval(tmp_path):
    steps = 200
    sft = run("sft", tmp_path / "sft", f"trainer.max_steps={steps}")
    lines = (sft.parent / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line and "step" in line]
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0]

    limit = ["data.max_samples=8", "generation.max_new_tokens=48"]
    sampled = run("sample", tmp_path / "sample", f"model.model_name_or_path={sft}", *limit)
    table = pq.read_table(sampled / "samples.parquet")
    assert table.num_rows == 8 * 4
    assert set(table.column("score").to_pylist()) <= {0.0, 1.0}

    scored = run("eval", tmp_path / "eval", f"models.sft={sft}", *limit)
    results = json.loads((scored / "results.json").read_text())
    assert (results["judge"], results["prompts"]) == ("number", 8)
    assert [row["model"] for row in results["rows"]] == ["base", "sft"]
