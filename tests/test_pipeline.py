"""A pipeline runs what is not there yet, once, and says what it did."""

import gc
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_stages
import pytest

from align.config.load import load_pipeline
from align.durable import read_json, write_json
from align.errors import AlignError
from align.pipeline import run_pipeline
from align.report.tables import show_status
from align.status import Plan, StageStatus, run_status, survey

TEXT = """
output_dir: {output}
defaults:
  data: {{dataset_name: {rows}}}
stages:
  sft:
    stage: sft
    model: {{model_name_or_path: {base}}}
    trainer: {{learning_rate: 1.0e-3}}
    merge_adapter: true
  prefs:
    stage: sample
    model: {{model_name_or_path: $sft}}
    scorer: {{judge: exact}}
  reward:
    stage: reward
    model: {{model_name_or_path: $sft}}
    data: {{dataset_name: $prefs/pairs.jsonl}}
  final:
    stage: dpo
    model: {{model_name_or_path: $sft}}
    data: {{dataset_name: $prefs/pairs.jsonl}}
  extra:
    stage: sft
    optional: true
    model: {{model_name_or_path: $sft}}
  eval:
    stage: eval
    models: {{base: {base}, sft: $sft, tuned: $final, more: $extra}}
    generation: {{temperatures: [1.0, 0.0]}}
    judge: exact
    reward_model: $reward
    reference: sft
"""

ALL = ["sft", "prefs", "reward", "final", "eval"]


class Place:
    """A folder with a pipeline file, and what ran in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.output = root / "runs" / "p"
        self.file = root / "pipeline.yaml"
        self.ran_file = root / "ran.txt"
        base = root / "base"
        base.mkdir()
        (base / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        (base / "model.safetensors").write_text("weights")
        self.rows = root / "rows.jsonl"
        self.rows.write_text('{"prompt": "a", "completion": "b"}\n')
        self.file.write_text(TEXT.format(output=self.output, rows=self.rows, base=base))

    def edit(self, old: str, new: str) -> None:
        text = self.file.read_text()
        assert old in text
        self.file.write_text(text.replace(old, new))

    def order(self, **orders: str) -> None:
        write_json(self.root / "control.json", orders)

    def run(
        self, *overrides: str, with_stages: tuple[str, ...] = (), **options: object
    ) -> list[str]:
        """Run the pipeline; the names of the stages that really ran."""
        self.ran_file.write_text("")
        loaded = load_pipeline(self.file, overrides, with_stages=with_stages)
        run_pipeline(loaded, **options)
        return self.ran_file.read_text().split()

    def survey(self, *overrides: str) -> dict[str, StageStatus]:
        plan = Plan.of(load_pipeline(self.file, overrides))
        return {stage.name: stage for stage in survey(plan)}

    def states(self, *overrides: str) -> dict[str, str]:
        return {name: stage.state for name, stage in self.survey(*overrides).items()}

    def child(self) -> subprocess.Popen[str]:
        here = Path(__file__).parent
        return subprocess.Popen(
            [sys.executable, str(here / "fake_stages.py"), "pipeline", str(self.file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{here.parent}:{here}"},
        )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    fake_stages.register(monkeypatch)
    # Slow where other tests have loaded torch or the disk is busy, and without effect here.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_CONTROL", str(tmp_path / "control.json"))
    monkeypatch.setenv("FAKE_RAN", str(tmp_path / "ran.txt"))
    monkeypatch.setenv("COLUMNS", "100")
    return Place(tmp_path)


def test_all_stages_run_in_order_and_the_table_is_shown(place: Place, capsys) -> None:
    assert place.run() == ALL
    shown = capsys.readouterr()
    assert "[1/5] sft (sft)" in shown.err
    assert "[5/5] eval (eval)" in shown.err
    rows = [line.split() for line in shown.out.splitlines()]
    names = [row[0] for row in rows if row]
    assert names[0] == "stage"
    for name in ("base", "sft", "prefs", "reward", "tuned", "eval"):
        assert name in names
    assert re.search(r"0\.500 \[\.480? \.520?\]", shown.out)  # digits by the terminal's width
    assert "accuracy 0.843" in shown.out
    assert "400 held-out prompts, 95% intervals; KL to sft" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 100
    table = (place.output / "table.md").read_text()
    assert table.startswith("| stage | score, T = 1 |")
    kept = read_json(place.output / "table.json")["rows"]
    tuned = next(row for row in kept if row.get("stage") == "final")
    assert tuned["label"] == "tuned (final)"
    assert (tuned["tokens"], tuned["kl"]) == (1234, 0.5)
    assert tuned["T=1"]["score"]["mean"] == pytest.approx(0.7)


def test_lineage_names_the_stage_that_an_input_came_from(place: Place) -> None:
    place.run()
    lineage = read_json(place.output / "reward" / "lineage.json")
    assert lineage["stages"] == {
        "model.model_name_or_path": "sft",
        "data.dataset_name": "prefs",
    }
    written = read_json(place.output / "sft" / "lineage.json")["outputs"]["files"]
    assert "adapter_model.safetensors" in written


def test_the_second_time_there_is_nothing_to_do(place: Place, capsys) -> None:
    place.run()
    before = {path: path.stat().st_mtime_ns for path in place.output.rglob("*")}
    capsys.readouterr()
    assert place.run() == []
    shown = capsys.readouterr()
    assert "nothing to do: all 5 stages are complete and unchanged" in shown.err
    assert "tuned (final)" in shown.out
    assert {path: path.stat().st_mtime_ns for path in place.output.rglob("*")} == before


def test_nothing_to_do_is_said_within_two_seconds_and_without_torch(place: Place) -> None:
    place.run()
    code = (
        "import sys; from align.config.load import load_pipeline\n"
        "from align.pipeline import run_pipeline\n"
        f"run_pipeline(load_pipeline({str(place.file)!r}))\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'numpy'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr
    assert "heavy: []" in done.stdout
    assert took < 2, took


def test_a_changed_stage_and_what_builds_on_it_run_again(place: Place, capsys) -> None:
    place.run()
    place.edit("  final:\n    stage: dpo", "  final:\n    stage: dpo\n    beta: 0.3")
    assert place.states() == {
        "sft": "complete",
        "prefs": "complete",
        "reward": "complete",
        "final": "changed",
        "extra": "off",
        "eval": "changed",
    }
    capsys.readouterr()
    assert place.run() == ["final", "eval"]
    said = capsys.readouterr().err
    assert "sft: unchanged" in said
    assert "final: runs again (beta: 0.1 -> 0.3)" in said
    place.edit("learning_rate: 1.0e-3", "learning_rate: 2.0e-3")
    assert place.run() == ALL


def test_a_replaced_run_is_kept_and_comes_back(place: Place, capsys) -> None:
    place.run()
    before = read_json(place.output / "final" / "lineage.json")
    place.run("final.beta=0.3")
    kept = sorted(path.name for path in (place.output / ".old").iterdir())
    assert [name.rpartition("-")[0] for name in kept] == ["eval", "final"]
    capsys.readouterr()
    assert place.run() == []
    assert "final: this very run was kept in .old/ and is back" in capsys.readouterr().err
    assert read_json(place.output / "final" / "lineage.json") == before
    assert place.run("final.beta=0.3") == []


def test_changed_rows_or_base_run_everything_again(place: Place) -> None:
    place.run()
    place.rows.write_text('{"prompt": "other", "completion": "b"}\n')
    assert place.run() == ALL
    (place.root / "base" / "model.safetensors").write_text("other")
    assert place.run() == ALL


def test_what_changes_no_result_runs_nothing_again(place: Place) -> None:
    place.run()
    overrides = ["sft.trainer.logging_steps=3", "final.trainer.save_steps=7"]
    overrides += ["sft.trainer.per_device_train_batch_size=4"]
    overrides += ["sft.trainer.gradient_accumulation_steps=2"]
    assert place.run(*overrides) == []
    (place.root / "base").rename(place.root / "moved")
    place.edit(str(place.root / "base"), str(place.root / "moved"))
    assert place.run() == []


def test_an_equal_artifact_changes_nothing_after_it(place: Place) -> None:
    place.run()
    assert place.run(force=["sft"]) == ["sft"]


def test_until_and_force_name_stages(place: Place, capsys) -> None:
    assert place.run(until="reward") == ["sft", "prefs", "reward"]
    assert not (place.output / "table.md").exists()
    assert place.run() == ["final", "eval"]
    with pytest.raises(AlignError, match="did you mean `reward`"):
        place.run(until="rewrd")
    with pytest.raises(AlignError, match="--force"):
        place.run(force=["extra"])


def test_an_optional_stage_runs_when_asked_for(place: Place) -> None:
    place.run()
    assert place.run(with_stages=("extra",)) == ["extra", "eval"]
    assert place.states()["extra"] == "off"
    assert place.run() == []


def test_a_failed_stage_leaves_the_finished_ones_and_the_same_command_goes_on(
    place: Place, capsys
) -> None:
    place.order(reward="fail after 1")
    with pytest.raises(AlignError) as caught:
        place.run()
    text = str(caught.value)
    assert "data.jsonl row 3: the rows are wrong" in text
    assert "the stage `reward` failed; sft, prefs stay as they are" in text
    assert "align run" in text
    assert caught.value.exit_code == 2
    found = place.survey()
    assert {name: stage.state for name, stage in found.items()} == {
        "sft": "complete",
        "prefs": "complete",
        "reward": "failed",
        "final": "missing",
        "extra": "off",
        "eval": "missing",
    }
    assert found["reward"].step == 1
    assert "the rows are wrong" in found["reward"].reasons[0]
    capsys.readouterr()
    show_status(list(found.values()))
    assert "failed (step 1)" in capsys.readouterr().out
    place.order()
    assert place.run() == ["reward", "final", "eval"]
    assert read_json(place.output / "reward" / "summary.json")["attempts"] == 2


def test_a_bug_leaves_a_record_too(place: Place) -> None:
    place.order(reward="bug after 0")
    with pytest.raises(ZeroDivisionError):
        place.run()
    assert place.survey()["reward"].reasons[0].startswith("ZeroDivisionError")


@pytest.mark.parametrize("how", ["kill", "term"])
@pytest.mark.parametrize("when", ["at once", "after 2"])
def test_a_killed_pipeline_goes_on(place: Place, how: str, when: str) -> None:
    place.order(final=f"{how} {when}")
    child = place.child()
    said, _ = child.communicate(timeout=60)
    assert child.returncode == (-signal.SIGKILL if how == "kill" else 1), said
    state = "missing" if (how, when) == ("term", "at once") else "partial"
    assert place.states()["final"] == ("failed" if how == "term" else state), said
    place.order()
    assert place.run() == ["final", "eval"]
    assert place.run() == []


def test_the_report_is_named_last_and_shows_where_values_come_from(place: Place, capsys) -> None:
    place.run("final.beta=0.3")
    line = f"report: {place.output}/report.html"
    assert capsys.readouterr().out.splitlines()[-1] == line
    page = (place.output / "report.html").read_text()
    assert "pipeline.yaml:9" in page
    assert "cannot be drawn" not in page
    assert re.search(r"<td>beta</td><td><bdi>0.3</bdi></td><td>--set", page)
    assert place.run("final.beta=0.3") == []
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert (place.output / "report.html").read_text() == page
    kept = read_json(place.output / "final" / "origins.json")
    assert kept["beta"].startswith("--set")
    assert "loss_type" not in kept


def test_a_failed_pipeline_has_a_report_too(place: Place, capsys) -> None:
    place.order(reward="fail after 1")
    with pytest.raises(AlignError):
        place.run()
    assert f"report: {place.output}/report.html" in capsys.readouterr().out
    assert "the rows are wrong" in (place.output / "report.html").read_text()
    place.order()
    place.run()
    assert "the rows are wrong" not in (place.output / "report.html").read_text()


@pytest.mark.parametrize("why", ["a bug", "a file of the user's"])
def test_a_run_never_fails_because_of_its_report(place: Place, capsys, monkeypatch, why) -> None:
    from align.report.html import page

    if why == "a bug":
        monkeypatch.setattr(page, "render", lambda *_: 1 / 0)
    else:
        place.output.mkdir(parents=True)
        (place.output / "report.html").write_text("mine")
    assert place.run() == ALL
    said = " ".join(capsys.readouterr().err.split())
    assert "no report: " in said
    assert ("ZeroDivisionError" if why == "a bug" else "no report of align") in said
    assert "tries again" in said
    if why != "a bug":
        assert (place.output / "report.html").read_text() == "mine"
    assert set(place.states().values()) == {"complete", "off"}


def test_two_commands_do_not_walk_one_pipeline(place: Place) -> None:
    place.order(prefs="sleep after 1")
    child = place.child()
    asleep = place.output / "prefs.partial" / "asleep"
    deadline = time.monotonic() + 30
    while not asleep.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(AlignError, match="is being written by another command"):
        place.run()
    child.terminate()
    child.communicate(timeout=60)


def test_a_launcher_around_a_pipeline_is_refused(place: Place, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AlignError, match="starts its own processes"):
        place.run()


def test_a_table_that_is_missing_is_written_again(place: Place) -> None:
    place.run()
    before = (place.output / "table.md").read_text()
    (place.output / "table.md").unlink()
    assert place.run() == []
    assert (place.output / "table.md").read_text() == before


def test_foreign_files_are_refused_before_anything_runs(place: Place) -> None:
    (place.output / "final").mkdir(parents=True)
    (place.output / "final" / "thesis.tex").touch()
    with pytest.raises(AlignError, match="no run of align"):
        place.run()
    assert place.ran_file.read_text() == ""
    assert sorted(path.name for path in place.output.iterdir()) == ["final"]


def test_bad_input_of_the_first_stage_leaves_nothing_behind(place: Place) -> None:
    place.order(sft="fail at once")
    with pytest.raises(AlignError, match="row 3"):
        place.run()
    assert not (place.root / "runs").exists()


def test_a_damaged_run_is_kept_and_made_again(place: Place, capsys) -> None:
    place.run()
    (place.output / "final" / "artifact" / "adapter_model.safetensors").unlink()
    assert place.states()["final"] == "damaged"
    assert place.run() == ["final"]
    assert "runs again (artifact/adapter_model.safetensors is missing" in capsys.readouterr().err


def test_several_processes_are_started_through_the_stage_command(place: Place, monkeypatch) -> None:
    seen: list[list[str]] = []

    def relaunch(argv: list[str], launch: object) -> int:
        from align.config.load import load_stage
        from align.runs import run_stage

        seen.append(argv)
        loaded = load_stage(argv[2])
        run_stage(loaded.config.model_copy(update={"launch": type(launch)()}))
        return 0

    monkeypatch.setattr("align.pipeline.relaunch", relaunch)
    overrides = ("reward.launch.num_processes=2",)
    place.run(*overrides, until="reward")
    assert [argv[:2] for argv in seen] == [["reward", "--recipe"]]
    monkeypatch.setattr("align.pipeline.relaunch", lambda argv, launch: 143)
    with pytest.raises(AlignError) as caught:
        place.run("final.launch.num_processes=2", *overrides)
    assert caught.value.exit_code == 143


def test_the_plan_is_read_back_from_the_folder(place: Place) -> None:
    place.run()
    plan = Plan.read(place.output)
    assert [stage.state for stage in survey(plan)] == [
        "complete" if name != "extra" else "off" for name in plan.configs
    ]
    with pytest.raises(AlignError, match="no folder of a pipeline"):
        Plan.read(place.root)


def test_the_status_of_one_run(place: Place) -> None:
    place.order(sft="fail after 2")
    with pytest.raises(AlignError):
        place.run()
    for folder in (place.output / "sft", place.output / "sft.partial"):
        found = run_status(folder)
        assert (found.state, found.step, found.kind) == ("partial", 2, "sft")
    place.order()
    place.run()
    found = run_status(place.output / "sft")
    assert (found.state, found.step) == ("complete", None)
    assert found.as_json()["summary"]["tokens"] == 1234
    assert found.size > 1000
    with pytest.raises(AlignError, match="no run of align"):
        run_status(place.root)
