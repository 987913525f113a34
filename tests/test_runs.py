"""A run folder is complete or absent, one command writes it, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_stages
import pytest
import yaml

from align.durable import read_json, write_json
from align.errors import AlignError
from align.locks import locked
from align.runs import RunFolder, is_done, run_stage
from align.secrets import scrub, scrub_arguments
from align.stages.sft import SFTConfig
from align.stopping import Stopped


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_stages.register(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # slow, and without effect here
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_CONTROL", str(tmp_path / "control.json"))


def order(tmp_path: Path, what: str | None) -> None:
    write_json(tmp_path / "control.json", {"sft": what})


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": []}\n', encoding="utf-8")
    return file


def sft(tmp_path: Path, rows: Path, **changes: object) -> SFTConfig:
    output = tmp_path / "runs" / "deep" / "sft"
    recipe = {
        "output_dir": str(output),
        "model": {"model_name_or_path": "org/model"},
        "data": {"dataset_name": str(rows)},
    }
    return SFTConfig.model_validate(recipe | changes)


def child(config: SFTConfig, tmp_path: Path) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}:{here}"}
    return subprocess.Popen(
        [sys.executable, str(here / "fake_stages.py"), "sft", config.model_dump_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_complete_run_holds_what_it_promises(tmp_path: Path, rows: Path) -> None:
    config = sft(tmp_path, rows)
    output = run_stage(config, inputs={"model.adapter_name_or_path": "first"})
    assert output == Path(config.output_dir)
    assert tree(output.parent) == [
        "sft",
        "sft/artifact",
        "sft/artifact/adapter_config.json",
        "sft/artifact/adapter_model.safetensors",
        "sft/environment.json",
        "sft/lineage.json",
        "sft/metrics.jsonl",
        "sft/recipe.yaml",
        "sft/summary.json",
    ]
    recipe = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    assert SFTConfig.model_validate(recipe) == config
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    assert all(line["stage"] == "sft" and line["time"] >= 0 for line in metrics)
    lineage = read_json(output / "lineage.json")
    found = {item["key"]: item for item in lineage["inputs"]}
    assert len(found["data[0]"]["sha256"]) == 64
    assert found["model.model_name_or_path"]["revision"] == "main"
    assert set(lineage["outputs"]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert lineage["stages"] == {"model.adapter_name_or_path": "first"}
    environment = read_json(output / "environment.json")
    assert environment["seeds"] == {"trainer.seed": 42}
    assert environment["versions"]["pydantic"]
    summary = read_json(output / "summary.json")
    assert summary["tokens"] == 1234
    assert summary["attempts"] == 1


def test_the_second_time_there_is_nothing_to_do(tmp_path: Path, rows: Path, capsys) -> None:
    config = sft(tmp_path, rows)
    output = run_stage(config)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    order(tmp_path, "fail at once")
    capsys.readouterr()
    assert run_stage(config) == output
    assert "sft: nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trainer": {"learning_rate": 0.5}}, "trainer.learning_rate: 0.0002 -> 0.5"),
        ({"lora": {"use_dora": True}}, "lora.use_dora: False -> True"),
        (
            {"model": {"model_name_or_path": "org/other"}},
            "model.model_name_or_path has other content",
        ),
    ],
)
def test_a_folder_with_another_run_is_refused(
    tmp_path: Path, rows: Path, change: dict, words: str
) -> None:
    output = run_stage(sft(tmp_path, rows))
    before = tree(tmp_path)
    with pytest.raises(AlignError, match="already holds another run") as caught:
        run_stage(sft(tmp_path, rows, **change))
    assert words in str(caught.value)
    assert f"mv {output}" in str(caught.value)
    assert caught.value.exit_code == 2
    assert tree(tmp_path) == before


def test_a_folder_with_other_rows_or_foreign_files_is_refused(tmp_path: Path, rows: Path) -> None:
    run_stage(sft(tmp_path, rows))
    rows.write_text('{"messages": [1]}\n', encoding="utf-8")
    with pytest.raises(AlignError, match="the rows have other content"):
        run_stage(sft(tmp_path, rows))
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").touch()
    with pytest.raises(AlignError, match="no run of align"):
        run_stage(sft(tmp_path, rows, output_dir=str(foreign)))
    assert tree(foreign) == ["chapter.tex"]


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path, rows: Path) -> None:
    config = sft(tmp_path, rows)
    Path(config.output_dir).mkdir(parents=True)
    assert (run_stage(config) / "lineage.json").exists()


def test_a_damaged_artifact_is_noticed(tmp_path: Path, rows: Path) -> None:
    output = run_stage(sft(tmp_path, rows))
    (output / "artifact" / "adapter_config.json").unlink()
    with pytest.raises(AlignError, match=r"artifact/adapter_config\.json is missing"):
        run_stage(sft(tmp_path, rows))


def test_bad_input_leaves_nothing_behind(tmp_path: Path, rows: Path) -> None:
    order(tmp_path, "fail at once")
    before = tree(tmp_path)
    with pytest.raises(AlignError, match="row 3"):
        run_stage(sft(tmp_path, rows))
    with pytest.raises(AlignError, match=r"none\.jsonl"):
        run_stage(sft(tmp_path, tmp_path / "none.jsonl"))
    assert tree(tmp_path) == before


def test_a_stage_that_failed_goes_on(tmp_path: Path, rows: Path, capsys) -> None:
    config = sft(tmp_path, rows)
    order(tmp_path, "fail after 1")
    with pytest.raises(AlignError, match="row 3"):
        run_stage(config)
    partial = Path(f"{config.output_dir}.partial")
    assert tree(partial / "parts") == ["0.json", "1.json"]
    assert not Path(config.output_dir).exists()
    order(tmp_path, None)
    run_stage(config)
    assert "going on with" in capsys.readouterr().err
    summary = read_json(Path(config.output_dir) / "summary.json")
    assert summary["attempts"] == 2
    metrics = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["attempt"] for line in metrics] == [1, 1, 2, 2]
    times = [json.loads(line)["time"] for line in metrics]
    assert times == sorted(times)
    assert not partial.exists()


def test_the_traceback_of_a_bug_is_kept_without_tokens(tmp_path: Path, rows: Path) -> None:
    order(tmp_path, "bug after 0")
    config = sft(tmp_path, rows)
    with pytest.raises(ZeroDivisionError) as caught:
        run_stage(config)
    log = Path(f"{config.output_dir}.partial") / "log.txt"
    assert "ZeroDivisionError" in log.read_text(encoding="utf-8")
    assert "hf_abc" not in log.read_text(encoding="utf-8")
    assert str(log) in caught.value.__notes__[0]


@pytest.mark.parametrize("when", ["at once", "after 0", "after 3"])
def test_a_killed_stage_goes_on_with_the_same_result(tmp_path: Path, rows: Path, when: str) -> None:
    undisturbed = run_stage(sft(tmp_path, rows, output_dir=str(tmp_path / "other")))
    config = sft(tmp_path, rows)
    order(tmp_path, f"kill {when}")
    killed = child(config, tmp_path)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not Path(config.output_dir).exists()
    order(tmp_path, None)
    output = run_stage(config)
    one, other = (read_json(path / "lineage.json")["outputs"] for path in (undisturbed, output))
    assert one == other
    assert read_json(output / "summary.json")["attempts"] == 2
    assert tree(output.parent)[0] == "sft"


def test_a_stop_between_the_last_file_and_the_new_name_needs_no_second_run(
    tmp_path: Path, rows: Path
) -> None:
    config = sft(tmp_path, rows)
    output = run_stage(config)
    output.rename(f"{output}.partial")
    order(tmp_path, "fail at once")
    run_stage(config)
    assert (output / "lineage.json").exists()


def test_an_unfinished_run_of_another_recipe_is_moved_aside(
    tmp_path: Path, rows: Path, capsys
) -> None:
    order(tmp_path, "fail after 1")
    for rate in (0.1, 0.2):
        with pytest.raises(AlignError):
            run_stage(sft(tmp_path, rows, trainer={"learning_rate": rate}))
    kept = [path for path in (tmp_path / "runs" / "deep").iterdir() if "partial-" in path.name]
    assert len(kept) == 1
    assert tree(kept[0] / "parts") == ["0.json", "1.json"]
    assert str(kept[0]) in capsys.readouterr().err


def test_a_torn_last_line_of_the_metrics_is_cut_off(tmp_path: Path, rows: Path) -> None:
    order(tmp_path, "fail after 1")
    config = sft(tmp_path, rows)
    with pytest.raises(AlignError):
        run_stage(config)
    metrics = Path(f"{config.output_dir}.partial") / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"stage": "sft", "st', encoding="utf-8")
    order(tmp_path, None)
    output = run_stage(config)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_two_commands_do_not_write_one_folder(tmp_path: Path, rows: Path) -> None:
    config = sft(tmp_path, rows)
    order(tmp_path, "sleep after 1")
    first = child(config, tmp_path)
    asleep = Path(f"{config.output_dir}.partial") / "asleep"
    deadline = time.monotonic() + 30
    while not asleep.exists():
        assert time.monotonic() < deadline, first.stderr.read() if first.poll() else "slow"
        time.sleep(0.02)
    with pytest.raises(AlignError, match=rf"process {first.pid} on "):
        run_stage(config)
    first.terminate()
    first.communicate(timeout=60)
    order(tmp_path, None)
    run_stage(config)


def test_a_lock_of_a_dead_process_does_not_hold(tmp_path: Path) -> None:
    file = tmp_path / "deep" / ".run.lock"
    file.parent.mkdir()
    file.write_text('{"pid": 1, "host": "gone"}', encoding="utf-8")
    with (
        locked(tmp_path / "deep" / "run"),
        pytest.raises(AlignError, match=str(os.getpid())),
        locked(tmp_path / "deep" / "run"),
    ):
        pass
    assert not file.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_in_good_order(
    tmp_path: Path, rows: Path, monkeypatch, number: int, code: int
) -> None:
    def interrupted(config: SFTConfig, folder: RunFolder) -> None:
        (folder.parts / "0.json").touch()
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(fake_stages, "run", interrupted)
    config = sft(tmp_path, rows)
    with pytest.raises(Stopped) as caught:
        run_stage(config)
    assert caught.value.exit_code == code
    assert "the same command goes on" in str(caught.value)
    assert tree(Path(config.output_dir).parent)[0] == "sft.partial"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_full_disk_is_said_in_words(tmp_path: Path, rows: Path, monkeypatch) -> None:
    def full(config: SFTConfig, folder: RunFolder) -> None:
        (folder.parts / "0.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fake_stages, "run", full)
    with pytest.raises(AlignError, match="the disk is full"):
        run_stage(sft(tmp_path, rows))


def test_a_full_gpu_is_said_in_words_and_a_split_step_goes_on(
    tmp_path: Path, rows: Path, monkeypatch
) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    def too_large(config: SFTConfig, folder: RunFolder) -> None:
        (folder.parts / "0.json").touch()
        if config.trainer.per_device_train_batch_size > 4:
            raise OutOfMemoryError("CUDA out of memory")
        (folder.artifact / "x").touch()

    monkeypatch.setattr(fake_stages, "run", too_large)
    with pytest.raises(AlignError, match=r"double trainer\.gradient_accumulation_steps"):
        run_stage(sft(tmp_path, rows))
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    output = run_stage(sft(tmp_path, rows, trainer=split))
    assert read_json(output / "summary.json")["attempts"] == 2


def test_whether_a_run_is_done_is_found_out_without_writing(tmp_path: Path, rows: Path) -> None:
    config = sft(tmp_path, rows)
    before = tree(tmp_path)
    assert not is_done(config)
    assert tree(tmp_path) == before
    run_stage(config)
    assert is_done(config)
    with pytest.raises(AlignError, match="another run"):
        is_done(sft(tmp_path, rows, merge_adapter=True))


def test_files_get_the_rights_of_the_umask(tmp_path: Path, rows: Path, monkeypatch) -> None:
    def private(config: SFTConfig, folder: RunFolder) -> None:
        (folder.artifact / "model.safetensors").touch(mode=0o600)

    monkeypatch.setattr(fake_stages, "run", private)
    file = run_stage(sft(tmp_path, rows)) / "artifact" / "model.safetensors"
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_place_that_cannot_be_written_is_said_in_words(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AlignError, match="output_dir"):
        run_stage(sft(tmp_path, rows, output_dir=str(tmp_path / "file" / "run")))


def test_numbers_of_other_libraries_and_nan_become_json(tmp_path: Path, rows: Path) -> None:
    class Scalar:
        def item(self) -> float:
            return 0.25

    folder = RunFolder(sft(tmp_path, rows))
    folder.log({"loss": float("nan"), "reward": Scalar(), "path": tmp_path}, step=3)
    folder.note("accuracy", {"value": Scalar(), "all": [float("inf")]})
    line = json.loads((folder.path / "metrics.jsonl").read_text())
    assert (line["loss"], line["reward"], line["path"]) == ("nan", 0.25, str(tmp_path))
    assert read_json(folder.path / "summary.json")["accuracy"] == {"value": 0.25, "all": ["inf"]}


def test_other_ranks_write_nothing(tmp_path: Path, rows: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    folder = RunFolder(sft(tmp_path, rows))
    folder.log({"loss": 1.0})
    folder.note("tokens", 1)
    folder.trace("base", "x")
    assert not folder.is_main
    assert not folder.path.exists()


def test_access_tokens_are_scrubbed() -> None:
    secret = "hf_" + "a1B2" * 8
    assert secret not in scrub(f"failed with {secret} in it, WANDB_API_KEY=0123abc")
    assert "0123abc" not in scrub("WANDB_API_KEY=0123abc")
    assert scrub("eos_token=<|eot_id|> max_new_tokens=5") == "eos_token=<|eot_id|> max_new_tokens=5"
    assert scrub_arguments(["align", "--hub-token", "plain", "--name", "x"])[2] == "<secret>"


def test_a_full_disk_that_takes_no_log_is_said_in_words(tmp_path: Path, rows: Path, monkeypatch):
    def full(config: SFTConfig, folder: RunFolder) -> None:
        (folder.parts / "0.json").touch()
        (folder.path / "log.txt").mkdir()  # a log that cannot be written
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fake_stages, "run", full)
    with pytest.raises(AlignError, match="the disk is full"):
        run_stage(sft(tmp_path, rows))


def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path, monkeypatch) -> None:
    def full(handle: int, text: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with locked(tmp_path / "run"):
        assert tree(tmp_path) == [".run.lock"]
    assert tree(tmp_path) == []
