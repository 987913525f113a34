"""Rounds walked to the end: what each starts from, which rows it reads, and that nothing runs twice."""

from pathlib import Path

import fake_stages
import pytest
import yaml
from datasets import Dataset

from align.config.load import load_pipeline
from align.durable import read_json
from align.pipeline import run_pipeline
from align.status import Plan, survey

TEXT = """
output_dir: {output}
rounds:
  number: 2
  stages: [samples, reward, sft, dpo]
  policy: dpo
  start: {base}
  keep: {{reward: all}}
  prompts: 2
defaults:
  data: {{dataset_name: {rows}}}
stages:
  samples:
    stage: sample
    model: {{model_name_or_path: $previous}}
    scorer: {{judge: exact}}
  reward:
    stage: reward
    model: {{model_name_or_path: $start}}
    data: {{dataset_name: $samples/pairs.jsonl}}
  sft:
    stage: sft
    model: {{model_name_or_path: $start}}
    data: {{dataset_name: $samples/sft.jsonl}}
    merge_adapter: true
  dpo:
    stage: dpo
    model: {{model_name_or_path: $sft}}
    data: {{dataset_name: $samples/pairs.jsonl}}
    merge_adapter: true
"""
FIRST = ["samples@1", "reward@1", "sft@1", "dpo@1"]
SECOND = [name.replace("@1", "@2") for name in FIRST]


class Place:
    """A pipeline of fake stages, and what ran."""

    def __init__(self, root: Path, ran: Path) -> None:
        self.output, self.file, self.ran_file = root / "runs", root / "p.yaml", ran
        base = root / "base"
        base.mkdir()
        (base / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        (base / "model.safetensors").write_text("weights")
        rows = root / "rows.jsonl"
        rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
        self.file.write_text(TEXT.format(output=self.output, rows=rows, base=base))

    def run(self, *overrides: str, **options: object) -> list[str]:
        self.ran_file.write_text("")
        run_pipeline(load_pipeline(self.file, overrides), **options)
        return self.ran_file.read_text().split()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    fake_stages.register(monkeypatch)
    monkeypatch.setenv("FAKE_RAN", str(tmp_path / "ran.txt"))
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, tmp_path / "ran.txt")


def test_all_rounds_run_once_and_a_change_runs_what_depends_on_it(place: Place) -> None:
    assert place.run() == FIRST + SECOND
    assert place.run() == []
    states = survey(Plan.of(load_pipeline(place.file)))
    assert {stage.state for stage in states} == {"complete"}
    assert place.run("dpo@2.beta=0.3") == ["dpo@2"]
    assert place.run("reward@1.trainer.learning_rate=1e-3") == ["reward@1"], "dpo@2 came back"
    assert place.run("dpo@1.beta=0.3") == ["dpo@1", *SECOND], "reward@1 came back"


def test_a_third_round_leaves_the_first_two_alone(place: Place) -> None:
    place.run()
    assert place.run("rounds.number=3") == [name.replace("@1", "@3") for name in FIRST]


def test_a_name_without_a_round_stands_for_all_of_them(place: Place) -> None:
    assert place.run(until="reward") == [*FIRST, *SECOND[:2]]
    assert place.run(until="sft@2") == ["sft@2"]
    assert place.run(force=["dpo"], until="dpo@1") == ["dpo@1"]


def test_lineage_says_what_a_round_was_made_of(place: Place) -> None:
    place.run()
    stages = read_json(place.output / "reward@2" / "lineage.json")["stages"]
    assert stages == {"data.datasets.0.path": "samples@1", "data.datasets.1.path": "samples@2"}
    sampled = yaml.safe_load((place.output / "samples@2" / "recipe.yaml").read_text())
    assert sampled["model"]["model_name_or_path"] == str(place.output / "dpo@1" / "artifact")
    assert sampled["data"]["dataset_train_split"] == "train[2:4]"


# --- the shipped recipe, cut to seconds -------------------------------------------------------

SMALL = (
    *("defaults.trainer.max_steps=2", "defaults.trainer.per_device_train_batch_size=4"),
    *("defaults.generation.max_new_tokens=12", "defaults.generation.num_generations=4"),
    *("preferences.data.dataset_train_split=pref[:12]", "best.data.dataset_train_split=rl[:8]"),
    *("seed.data.max_samples=16", "eval.data.max_samples=4", "best.pairs.only_finished=false"),
    *("preferences.pairs.rule_options={}", "reward.data.test_split_size=2"),
    *("preferences.pairs.pair_rule=best_worst", "preferences.pairs.only_finished=false"),
)


def rows(folder: Path, name: str) -> int:
    return len(Dataset.from_json(str(folder / "artifact" / name)))


@pytest.mark.slow
def test_the_shipped_rounds_hand_over_and_resume(tmp_path, capsys):
    output = tmp_path / "runs"
    loaded = load_pipeline("tiny/rounds", [f"output_dir={output}", *SMALL])
    run_pipeline(loaded)

    def recipe(stage: str) -> dict:
        return yaml.safe_load((output / stage / "recipe.yaml").read_text())

    def made_of(stage: str) -> dict[str, str]:
        return {
            one["key"]: one.get("sha256")
            for one in read_json(output / stage / "lineage.json")["inputs"]
        }

    base = made_of("seed")["model.model_name_or_path"]
    for number in (1, 2):
        assert made_of(f"sft@{number}")["model.model_name_or_path"] == base, "anew from the base"
        started = recipe(f"dpo@{number}")["model"]["model_name_or_path"]
        assert started == str(output / f"sft@{number}" / "artifact"), "this round's SFT"
    policies = [recipe(f"best@{n}")["model"]["model_name_or_path"] for n in (1, 2)]
    assert policies == [str(output / stage / "artifact") for stage in ("seed", "dpo@1")]

    def read(stage: str) -> list[int]:
        """Rows that each source of a stage gave."""
        data = read_json(output / stage / "lineage.json")["data"]
        return [one["rows"] for one in data["sources"]]

    pairs = [rows(output / f"preferences@{n}", "pairs.jsonl") for n in (1, 2)]
    best = [rows(output / f"best@{n}", "sft.jsonl") for n in (1, 2)]
    assert min(pairs + best) > 0
    assert read("reward@1") == pairs[:1]
    assert read("reward@2") == pairs, "all preferences so far"
    assert read("dpo@2") == pairs[1:], "this round's"
    assert read("sft@2")[-2:] == best
    prompts = [
        Dataset.from_parquet(str(output / f"best@{n}/artifact/samples.parquet")) for n in (1, 2)
    ]
    seen = [{str(row) for row in table["prompt"]} for table in prompts]
    assert len(seen[0]) == len(seen[1]) == 4
    assert not seen[0] & seen[1], "each round has prompts of its own"
    assert (output / "mean" / "artifact" / "model.safetensors").is_file()

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    capsys.readouterr()
    run_pipeline(load_pipeline("tiny/rounds", [f"output_dir={output}", *SMALL]))
    assert "nothing to do: all 13 stages are complete" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
