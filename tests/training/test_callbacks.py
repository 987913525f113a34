"""What watches a training run: numbers, signals, metrics; alone and in two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from align.errors import AlignError
from align.runs import RunFolder
from align.stages.sft import SFTConfig
from align.stopping import Stopped
from align.training.callbacks import (
    CheckpointCallback,
    FiniteCallback,
    MeterCallback,
    MetricsCallback,
    SignalCallback,
    training_callbacks,
)

ARGUMENTS: Any = SimpleNamespace(fp16=False, logging_nan_inf_filter=True, output_dir="")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"model_name_or_path": "org/model"},
        "data": {"dataset_name": str(rows)},
    }
    return RunFolder(SFTConfig.model_validate(recipe))


def state(step: int = 7, most: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=most)


@pytest.mark.parametrize("logs", [{"loss": float("nan")}, {"loss": 1.0, "grad_norm": float("inf")}])
def test_a_number_that_is_not_finite_stops_the_run(logs: dict[str, float]) -> None:
    callback = FiniteCallback()
    callback.on_train_begin(ARGUMENTS, state(5), TrainerControl())
    assert ARGUMENTS.logging_nan_inf_filter is False
    with pytest.raises(AlignError, match="step 7; nothing was saved since, checkpoint-5 is good"):
        callback.on_log(ARGUMENTS, state(7), TrainerControl(), logs=logs)
    callback.on_log(ARGUMENTS, state(7), TrainerControl(), logs={"loss": 1.0, "eval_loss": 2.0})


def test_infinite_gradients_are_the_scalers_affair_in_float16() -> None:
    half: Any = SimpleNamespace(fp16=True)
    FiniteCallback().on_log(half, state(), TrainerControl(), logs={"grad_norm": float("inf")})


def test_a_weight_that_is_not_finite_is_not_saved() -> None:
    model = torch.nn.Linear(2, 2)
    callback = FiniteCallback()
    callback.on_save(ARGUMENTS, state(3), TrainerControl(), model=model)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(AlignError, match="a trained weight is not finite at step 4"):
        callback.on_save(ARGUMENTS, state(4), TrainerControl(), model=model)
    model.weight.requires_grad_(False)
    callback.on_save(ARGUMENTS, state(4), TrainerControl(), model=model)


def test_every_step_before_a_checkpoint_is_looked_at() -> None:
    control = TrainerControl(should_save=True)
    FiniteCallback().on_step_end(ARGUMENTS, state(), control)
    assert control.should_log


def test_a_second_signal_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = SignalCallback()
    before = signal.getsignal(signal.SIGINT)
    callback.on_train_begin(ARGUMENTS, state(), TrainerControl())
    os.kill(os.getpid(), signal.SIGINT)
    control = TrainerControl()
    callback.on_step_end(ARGUMENTS, state(), control)
    assert control.should_save
    assert control.should_training_stop
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_ends_the_run_after_the_checkpoint() -> None:
    callback = SignalCallback()
    callback.on_train_begin(ARGUMENTS, state(), TrainerControl())
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="goes on from step 7 of 10") as caught:
        callback.on_save(ARGUMENTS, state(), TrainerControl(should_training_stop=True))
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_in_the_last_step_is_not_lost() -> None:
    callback = SignalCallback()
    callback.on_train_begin(ARGUMENTS, state(10), TrainerControl())
    os.kill(os.getpid(), signal.SIGINT)
    callback.on_save(ARGUMENTS, state(10), TrainerControl(should_training_stop=True))
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_end(ARGUMENTS, state(10), TrainerControl())


def test_logs_go_to_the_metrics_and_to_the_meter(folder: RunFolder, capsys) -> None:
    logs = {"loss": 0.5, "num_tokens": 100.0}
    MetricsCallback(folder).on_log(ARGUMENTS, state(), TrainerControl(), logs=logs)
    line = json.loads((folder.path / "metrics.jsonl").read_text())
    assert (line["step"], line["loss"], line["num_tokens"]) == (7, 0.5, 100)
    meter = MeterCallback(folder)
    meter.on_train_begin(ARGUMENTS, state(0), TrainerControl())
    meter.on_step_end(ARGUMENTS, state(5), TrainerControl(should_log=True))
    assert capsys.readouterr().err == ""
    meter.on_log(ARGUMENTS, state(5), TrainerControl(), logs=logs)
    assert "sft: 5/10 steps, loss 0.5" in capsys.readouterr().err


def test_the_trainers_own_printing_and_removal_are_off(folder: RunFolder) -> None:
    removed = []
    arguments = SimpleNamespace(save_total_limit=3)
    trainer: Any = SimpleNamespace(args=arguments, remove_callback=removed.append)
    found = training_callbacks(folder, trainer)
    assert {kind.__name__ for kind in removed} == {"PrinterCallback", "ProgressCallback"}
    assert arguments.save_total_limit is None
    kept = next(callback for callback in found if isinstance(callback, CheckpointCallback))
    assert kept.limit == 3
    kinds = [type(callback) for callback in found]
    assert kinds.index(FiniteCallback) < kinds.index(CheckpointCallback)
    assert kinds.index(CheckpointCallback) < kinds.index(SignalCallback)


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """SIGTERM reaches one rank only; both save at the same step, and resume bit for bit."""

    def ranks(place: str, order: str) -> tuple[int, list[dict[str, str]]]:
        probe = Path(__file__).with_name("resume_probe.py")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [sys.executable, *launcher, str(probe), str(tmp_path / place / "run"), order],
            capture_output=True,
            text=True,
            timeout=200,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        )
        written = done.stdout.replace("}{", "}\n{")  # two ranks write at once
        lines = [line for line in written.splitlines() if line.startswith("{")]
        return done.returncode, [json.loads(line) for line in lines]

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    code, undisturbed = ranks("a", "undisturbed")
    assert code == 0
    expected = {found["hash"] for found in undisturbed}
    assert len(undisturbed) == 2
    assert len(expected) == 1
    code, stopped = ranks("b", "signal 15")
    assert code != 0
    assert len(stopped) == 2
    assert all("goes on from step 4 of 6" in found["error"] for found in stopped)
    kept = tmp_path / "b" / "run.partial" / "checkpoints" / "checkpoint-4" / "manifest.json"
    files = json.loads(kept.read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= set(files)
    code, resumed = ranks("b", "undisturbed")
    assert code == 0
    assert {found["hash"] for found in resumed} == expected
