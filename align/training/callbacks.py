"""What watches a training run: checkpoints, signals, non-finite numbers, metrics and progress."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from align.errors import fail
from align.launch import PATIENCE
from align.report.progress import Meter
from align.runs import RunFolder
from align.stopping import Stopped
from align.training.checkpoints import keep_newest, write_manifest
from align.training.sharding import all_finite


def training_callbacks(folder: RunFolder, trainer: Trainer) -> list[TrainerCallback]:
    """The callbacks that every training stage adds to its trainer, in the order they must run.

    The trainer's own printing and its own removal of old checkpoints are switched off: the one
    would repeat ours, the other removes a checkpoint before the next one is complete.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    return [
        ResumeCallback(trainer),
        FiniteCallback(),
        CheckpointCallback(folder, limit),
        SignalCallback(),
        MetricsCallback(folder),
        MeterCallback(folder),
    ]


def _distributed() -> bool:
    return bool(distributed.is_available() and distributed.is_initialized())


class ResumeCallback(TrainerCallback):  # type: ignore[misc]
    """Lets a resumed run close as an undisturbed one does.

    The Trainer counts tokens and the mean loss from the resumed step on, and trains one step too
    many when the checkpoint is the last one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.global_step:
            return
        last, total, tokens = 0, 0.0, 0
        for line in state.log_history:
            if "loss" in line:
                total += line["loss"] * (line["step"] - last)
                last = line["step"]
                tokens = int(line.get("num_tokens", tokens))
        self.trainer._total_loss_scalar = total
        self.trainer._initial_global_step = 0
        self.trainer._total_train_tokens = tokens
        if state.global_step >= state.max_steps:
            self.trainer._run_epoch = lambda *_, **__: None
            control.should_training_stop = True


class FiniteCallback(TrainerCallback):  # type: ignore[misc]
    """Stops a run whose loss, gradient or weights are no longer finite, before it saves them."""

    def __init__(self) -> None:
        self.good: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # The filter would replace a NaN in the log by the mean of the steps before.
        args.logging_nan_inf_filter = False
        self.good = state.global_step or None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if control.should_save:  # so that every step before a checkpoint has been looked at
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        # With float16 the gradient scaler meets infinite gradients and skips them; that is its job.
        watched = ("loss",) if args.fp16 else ("loss", "grad_norm")
        for key in watched:
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(value):
                self._refuse(f"{key} is {value}", state.global_step)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        if model is not None and not all_finite(model):
            self._refuse("a trained weight is not finite", state.global_step)
        self.good = state.global_step

    def _refuse(self, what: str, step: int) -> None:
        kept = f"checkpoint-{self.good} is good" if self.good else "there is no checkpoint before"
        fail(
            f"{what} at step {step}; nothing was saved since, {kept}",
            where="training",
            hint="lower trainer.learning_rate or trainer.max_grad_norm, and look at the rows with "
            "`align inspect`",
        )


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Declares each checkpoint complete once all ranks wrote their part, then removes old ones."""

    def __init__(self, folder: RunFolder, limit: int | None) -> None:
        self.folder = folder
        self.limit = limit

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if _distributed():
            distributed.barrier()
        if self.folder.is_main:
            checkpoints = Path(args.output_dir)
            write_manifest(checkpoints / f"checkpoint-{state.global_step}", state.global_step)
            keep_newest(checkpoints, self.limit, state.best_model_checkpoint)
        if _distributed():
            distributed.barrier()


class SignalCallback(TrainerCallback):  # type: ignore[misc]
    """After SIGTERM, SIGUSR1 or Ctrl-C: finish the step, save, leave with exit code 128 + signal.

    Ranks agree on it at each step's end, so that a signal that reaches them at different times (or
    only one of them) stops all at the same step. A second signal ends the process at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0
        self.kept: dict[int, Any] = {}
        self.group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if _distributed():
            # Flags go over the CPU: waiting for the GPU at each step would cost its queue.
            self.group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        for number in self.SIGNALS:
            self.kept[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, _: Any) -> None:
        if self.received:
            self.restore()
            os.kill(os.getpid(), number)
        self.received = number

    def restore(self) -> None:
        """Put the handlers of before back; also where training ended in an exception, which calls no callback."""
        for number, handler in self.kept.items():
            signal.signal(number, handler)
        self.kept.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.group is not None:
            flag = torch.tensor(self.received)
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.group)
            self.received = int(flag)
        if self.received:
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Only a step's end sets should_training_stop for a signal, so all ranks come here together.
        if self.received and control.should_training_stop and state.global_step < state.max_steps:
            self.restore()
            step = f"step {state.global_step} of {state.max_steps}"
            raise Stopped(self.received, f"the same command goes on from {step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.restore()
        if self.received:  # in the last step: training is through and saved, the stage is not
            os.kill(os.getpid(), self.received)


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """Writes what the trainer logs to metrics.jsonl."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.folder.log(logs or {}, step=state.global_step)


SHOWN = {
    "loss": "loss",
    "eval_loss": "eval_loss",
    "objective/reward": "reward",
    "objective/kl": "kl",
}
"""Logged figures that the progress line shows, and what it calls them."""


class MeterCallback(TrainerCallback):  # type: ignore[misc]
    """Shows step, loss, tokens per second, time left and memory."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.meter: Meter | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.meter = Meter(
            state.max_steps,
            self.folder.name,
            unit="steps",
            done=state.global_step,
            quiet=self.folder.quiet,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.meter is not None and not control.should_log:  # else the log brings the figures
            self.meter.update(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        shown = {name: logs[key] for key, name in SHOWN.items() if logs and key in logs}
        tokens = (logs or {}).get("num_tokens")
        if self.meter is not None and (shown or tokens):
            self.meter.update(state.global_step, tokens=tokens, **shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.meter is not None:
            self.meter.close()
