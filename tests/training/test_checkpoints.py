"""A checkpoint is complete or does not count, and a resumed run ends as an undisturbed one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.training.checkpoints import (
    MANIFEST,
    checkpoint_folders,
    damage,
    keep_newest,
    newest_complete_checkpoint,
    write_manifest,
)

PROBE = Path(__file__).with_name("resume_probe.py")
STEPS = ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "save_to_json"]
OURS = ["write_manifest", "sync_tree", "write_json", "keep_newest"]


def make(folder: Path, step: int, *, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "sub").mkdir(parents=True)
    (checkpoint / "weights.safetensors").write_bytes(bytes(range(200)) + bytes([step]))
    (checkpoint / "sub" / "optimizer.pt").write_bytes(b"o" * 50)
    (checkpoint / "training_args.bin").write_bytes(b"pickle with hf_secret")
    if complete:
        write_manifest(checkpoint, step)
    return checkpoint


def test_the_newest_complete_checkpoint_is_by_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (8, 100, 20):
        make(tmp_path, step)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert newest_complete_checkpoint(tmp_path / "none") is None


def test_an_unfinished_checkpoint_is_moved_aside_and_said(tmp_path: Path, capsys) -> None:
    good = make(tmp_path, 10)
    make(tmp_path, 20, complete=False)
    assert newest_complete_checkpoint(tmp_path) == good
    assert (tmp_path / "checkpoint-20.bad").is_dir()
    assert "checkpoint-20 is left out: it was never finished" in capsys.readouterr().err
    make(tmp_path, 20, complete=False)
    assert newest_complete_checkpoint(tmp_path) == good
    assert (tmp_path / "checkpoint-20.bad-2").is_dir()


def test_the_pickle_that_may_hold_tokens_does_not_stay(tmp_path: Path) -> None:
    assert not (make(tmp_path, 10) / "training_args.bin").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "sub/optimizer.pt", MANIFEST])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_change_of_a_file_is_seen(tmp_path_factory, name: str, data: st.DataObject) -> None:
    checkpoint = make(tmp_path_factory.mktemp("damage"), 10)
    file = checkpoint / name
    before = file.read_bytes()
    at = data.draw(st.integers(0, len(before) - 1))
    kind = data.draw(st.sampled_from(["delete", "cut", "flip", "zero tail"]))
    after = {
        "cut": before[:at],
        "flip": before[:at]
        + bytes([before[at] ^ (1 << data.draw(st.integers(0, 7)))])
        + before[at + 1 :],
        "zero tail": before[:at] + bytes(len(before) - at),
    }
    if kind == "delete":
        file.unlink()
    else:
        file.write_bytes(after[kind])
        if name == MANIFEST and _same_files(before, after[kind]):
            return  # the step or white space of the manifest itself: the checkpoint is whole
        if after[kind] == before:
            return
    assert damage(checkpoint) is not None


@pytest.mark.parametrize("word", ["size", "sha256", "files", "weights.safetensors"])
def test_a_manifest_with_a_flipped_name_is_damage(tmp_path: Path, word: str) -> None:
    """A bit in the manifest's own words: the checkpoint does not count, and nothing is raised."""
    checkpoint = make(tmp_path, 10)
    manifest = checkpoint / MANIFEST
    manifest.write_text(manifest.read_text().replace(f'"{word}"', f'"{word[:-1]}~"', 1))
    assert damage(checkpoint) is not None
    assert newest_complete_checkpoint(tmp_path) is None


def _same_files(before: bytes, after: bytes) -> bool:
    try:
        return json.loads(before)["files"] == json.loads(after)["files"]
    except (ValueError, KeyError, TypeError):
        return False


def test_old_checkpoints_go_only_when_newer_ones_are_complete(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make(tmp_path, step)
    make(tmp_path, 40, complete=False)
    (tmp_path / "checkpoint-5.bad").mkdir()
    keep_newest(tmp_path, 2)
    left = [path.name for path in checkpoint_folders(tmp_path)]
    assert left == ["checkpoint-40", "checkpoint-30", "checkpoint-20"]
    assert not (tmp_path / "checkpoint-5.bad").exists()


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make(tmp_path, step)
    keep_newest(tmp_path, 1, best="/elsewhere/checkpoint-10")
    assert [path.name for path in checkpoint_folders(tmp_path)] == [
        "checkpoint-30",
        "checkpoint-10",
    ]


def probe(place: Path, *scenarios: str) -> dict[str, dict]:
    """Run scenarios of real training in a process of their own; scenario -> what happened."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(PROBE), str(place), *scenarios],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "XDG_CACHE_HOME": str(place)},
        timeout=560,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["scenario"]: line for line in lines}


@pytest.mark.slow
def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """Weights bit for bit, and the step, the mean loss and the token count that are reported."""
    points = ["kill after _save_optimizer_and_scheduler 4", "half after save_to_json 4"]
    found = probe(tmp_path, "undisturbed", "again", "signal 15", "signal 2", "nan 3", *points)
    expected = found["undisturbed"]["then"]["hash"]
    assert " 6 " in expected
    for name in ("again", "signal 15", "signal 2", *points):
        assert found[name]["then"] == {"hash": expected}, name
        assert found[name]["end"] == ["checkpoint-4", "checkpoint-6"], name
    assert found["signal 15"]["first"]["exit_code"] == 143
    assert found["signal 2"]["first"]["exit_code"] == 130
    assert "goes on from step 4 of 6" in found["signal 15"]["first"]["error"]
    assert found[points[0]]["first"] == {"signal": 9}
    nan = found["nan 3"]
    assert nan["then"]["exit_code"] == 2
    assert "at step 4; nothing was saved since, checkpoint-2 is good" in nan["then"]["error"]
    assert nan["end"] == ["checkpoint-2"]


@pytest.mark.slow
@pytest.mark.skipif(
    "ALIGN_CRASH_MATRIX" not in os.environ, reason="two minutes; set ALIGN_CRASH_MATRIX=1"
)
def test_the_crash_matrix(tmp_path: Path) -> None:
    """Kill before and after every part of a save; delete, cut and flip every file."""
    kills = [f"kill {when} {name} 4" for name in STEPS + OURS for when in ("before", "after")]
    kills += ["kill before rmtree 6", "kill after rmtree 6"]
    kills += [f"half after {name} 4" for name in [*STEPS, "write_manifest"]]
    hurts = [f"hurt {how}" for how in ("delete", "truncate", "flip")]
    found = probe(tmp_path, "undisturbed", *kills, *hurts)
    expected = {"hash": found["undisturbed"]["then"]["hash"]}
    for name in kills:
        assert found[name]["first"] == {"signal": 9}, name
        assert found[name]["then"] == expected, name
    for name in hurts:
        assert len(found[name]["files"]) >= 8
        assert all(result == expected for result in found[name]["files"].values()), found[name]
