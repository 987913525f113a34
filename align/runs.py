"""A run is a folder, complete or absent: recipe, metrics, environment, lineage, summary, artifact.

A stage works in `<output_dir>.partial/`. When it is through, every file is flushed and hashed and
the folder is renamed to `<output_dir>/`. A stopped stage leaves its partial folder, and the same
command goes on from the checkpoints or parts in it. Of several processes the main one writes.
"""

import errno
import importlib
import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from align.config.sections import StageConfig
from align.config.sharding import sharding_in_force, sharding_troubles
from align.durable import free_name, read_json, rename, sync_tree, write_json, write_text
from align.environment import environment, is_main, keep_freed_memory
from align.errors import AlignError, Problem, fail
from align.launch import check_world
from align.lineage import (
    Identity,
    digest_of,
    file_sha256,
    folder_files,
    identify,
    leaves,
)
from align.locks import locked
from align.pushes import check_push, push_complete
from align.ranks import on_main, wait_for_all
from align.report.terminal import say
from align.secrets import scrub, scrubbed
from align.stages import STAGES
from align.standing import check_inputs, refuse, standing
from align.stopping import Stopped, stoppable

WORKING = ("checkpoints", "parts")
"""Folders that only an unfinished run needs."""


SMALLER = (
    "halve trainer.per_device_train_batch_size and double trainer.gradient_accumulation_steps "
    "(the same command goes on), set trainer.gradient_checkpointing: true, or lower "
    "data.max_length or the generation and score batch sizes"
)
"""The ways out when memory does not suffice."""

ORIGINS_FILE = "origins.json"
"""Where each value of the recipe that is no default came from."""

UNSET_MATTERS = (("model", "adapter_mode"), ("launch", "num_processes"))
"""Keys whose default means something else when it is written down."""


def output_path(config: StageConfig) -> Path:
    """The absolute run folder of a config."""
    return Path(config.output_dir).expanduser().absolute()


def partial_path(output: Path) -> Path:
    """Where an unfinished run of that folder lies."""
    return output.with_name(f"{output.name}.partial")


def given(origins: Mapping[str, str]) -> dict[str, str]:
    """The origins of what is no default; access tokens in them are left out."""
    return {key: scrub(origin) for key, origin in origins.items() if origin != "default"}


def recipe_text(config: StageConfig) -> str:
    """A config as YAML that loads again; access tokens are left out."""
    recipe = scrubbed(config.model_dump(mode="json"))
    given = config.model_dump(mode="json", exclude_unset=True)
    for section, key in UNSET_MATTERS:
        if key in recipe.get(section, {}) and key not in given.get(section, {}):
            del recipe[section][key]
    ordered = {"stage": recipe.pop("stage"), "output_dir": recipe.pop("output_dir"), **recipe}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """A value as JSON has it: scalars of torch and NumPy unpacked, NaN and infinity as words, no access token."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str | int | float):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int | float | None):
        return value
    return scrub(str(value))


class RunFolder:
    """Everything a stage writes. Made by `run_stage`; a stage only fills it.

    Opening it makes the partial folder, or goes on with the one that is there. Only the main
    process writes; in the others `log`, `note` and `trace` do nothing and the paths are the same.
    """

    def __init__(
        self,
        config: StageConfig,
        *,
        name: str | None = None,
        quiet: bool = False,
        identity: Identity | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.stage = str(config.model_dump(include={"stage"})["stage"])
        self.name = name or self.stage
        self.quiet = quiet
        self.output = output_path(config)
        self.path = partial_path(self.output)
        self.is_main = is_main()
        self.attempt = 1
        self._notes: dict[str, Any] = {}
        self._seconds_before = 0.0
        self._started = time.monotonic()
        if self.is_main:
            self._open(identity or identify(config), origins)

    @property
    def artifact(self) -> Path:
        """What the next stage reads."""
        return self.path / "artifact"

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints; gone when the run is complete."""
        return self.path / "checkpoints"

    @property
    def parts(self) -> Path:
        """Finished pieces of a stage that works piece by piece; gone when the run is complete."""
        return self.path / "parts"

    @property
    def seconds(self) -> float:
        """Time spent so far, over all attempts."""
        return self._seconds_before + time.monotonic() - self._started

    def log(self, metrics: Mapping[str, Any], *, step: int | None = None) -> None:
        """Append a line to metrics.jsonl: stage, attempt, step, seconds so far, the metrics."""
        if not self.is_main:
            return
        line = {"stage": self.name, "attempt": self.attempt, "step": step}
        line |= {"time": round(self.seconds, 3)} | _plain(metrics)
        if line["step"] is None:
            del line["step"]
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")

    def note(self, key: str, value: Any) -> None:
        """Put a key metric into summary.json, which `align status` and the table show."""
        if self.is_main:
            self._notes[key] = _plain(value)
            self._write_summary()

    def trace(self, key: str, value: Any) -> None:
        """Put a fact about the result's origin (base model, rows) into lineage.json."""
        if self.is_main:
            self._lineage[key] = _plain(value)
            write_json(self.path / "lineage.json", self._lineage, flush=False)

    def data(self, rows: Any) -> None:
        """Put the origin of a stage's rows into lineage.json, and say what was made of them."""
        self.trace("data", rows.origin())
        if self.is_main and not self.quiet:
            for note in rows.notes:
                say(f"{self.name}: {note}")

    def finish(self) -> Path:
        """Hash the outputs, flush everything and give the folder its final name.

        Every rank calls it; all come back when the folder is there.
        """
        wait_for_all()
        if self.is_main:
            self._complete()
        self.path = self.output
        wait_for_all()
        return self.output

    def wrote_something(self) -> bool:
        """Whether there is a file that a later attempt could use."""
        return any(
            next(folder_files(folder), None) is not None
            for folder in (self.artifact, self.checkpoints, self.parts)
        )

    def discard(self) -> None:
        """Take the partial folder away again."""
        shutil.rmtree(self.path, ignore_errors=True)

    def pause(self) -> None:
        """Keep the clock for the attempt that goes on."""
        self._write_summary()

    def record_failure(self, error: BaseException) -> Path | None:
        """Append the traceback to this process's log and return it; None without a folder or room for it."""
        if not self.path.exists():  # the main process took it away after a refusal
            return None
        rank = os.environ.get("RANK", "0")
        log = self.path / ("log.txt" if self.is_main else f"log-rank{rank}.txt")
        text = "".join(traceback.format_exception(error))
        try:
            with log.open("a", encoding="utf-8") as handle:
                handle.write(f"attempt {self.attempt}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
                handle.write(scrub(text) + "\n")
        except OSError:  # a full disk: the error itself must not be lost over its log
            return None
        return log

    def _open(self, identity: Identity, origins: Mapping[str, str] | None) -> None:
        for folder in (self.artifact, self.checkpoints, self.parts):
            _make_folder(folder)
        kept = read_json(self.path / "lineage.json")
        if isinstance(kept, dict) and kept.get("fingerprint") == identity.fingerprint:
            self._go_on()
            self._lineage: dict[str, Any] = kept
            return
        self._lineage = {
            "stage": self.stage,
            "name": self.name,
            "fingerprint": identity.fingerprint,
            "parts": identity.parts,
            "inputs": scrubbed([{"key": key} | facts for key, facts in identity.inputs.items()]),
        }
        write_text(self.path / "recipe.yaml", recipe_text(self.config), flush=False)
        if origins is not None:
            write_json(self.path / ORIGINS_FILE, given(origins), flush=False)
        write_json(self.path / "environment.json", self._environment(), flush=False)
        write_json(self.path / "lineage.json", self._lineage, flush=False)
        self._write_summary()

    def _go_on(self) -> None:
        """Take over the notes and the clock of the attempts before this one."""
        summary = read_json(self.path / "summary.json") or {}
        self._seconds_before = max(float(summary.get("seconds", 0)), _last_time(self.path))
        self.attempt = int(summary.get("attempts", 1)) + 1
        own = {"stage", "name", "attempts", "seconds"}
        self._notes = {key: value for key, value in summary.items() if key not in own}
        self._write_summary()

    def _environment(self) -> dict[str, Any]:
        recipe = dict(leaves(self.config.model_dump(mode="json")))
        seeds = {key: value for key, value in recipe.items() if key.split(".")[-1] == "seed"}
        return environment() | {"seeds": seeds}

    def _write_summary(self) -> None:
        head: dict[str, Any] = {"stage": self.stage, "name": self.name}
        head |= {"attempts": self.attempt, "seconds": round(self.seconds, 3)}
        write_json(self.path / "summary.json", head | self._notes, flush=False)

    def _complete(self) -> None:
        _open_to_the_group(self.artifact)
        files = {
            path.relative_to(self.artifact).as_posix(): {
                "size": path.stat().st_size,
                "sha256": file_sha256(path),
            }
            for path in folder_files(self.artifact)
        }
        if not files:
            raise RuntimeError(f"the stage `{self.stage}` ended without an artifact")
        self._write_summary()
        write_json(self.path / "environment.json", self._environment(), flush=False)
        # The lineage with outputs says that all files are there: they must reach the disk first.
        sync_tree(self.artifact)
        content = digest_of({name: facts["sha256"] for name, facts in files.items()})
        self._lineage["outputs"] = {"artifact": content, "files": files}
        write_json(self.path / "lineage.json", self._lineage)
        publish(self.path, self.output)


def publish(partial: Path, output: Path) -> None:
    """Flush a finished partial folder, give it its final name and drop what only it needed."""
    sync_tree(partial)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    rename(partial, output)
    _tidy(output)


def _open_to_the_group(root: Path) -> None:
    """Give files the rights that the umask asks for; safetensors makes them the owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder_files(root):
        path.chmod(0o666 & ~mask)


def _tidy(output: Path) -> None:
    for name in WORKING:
        shutil.rmtree(output / name, ignore_errors=True)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(
            f"cannot be made: {error.strerror}",
            where=f"output_dir: {path}",
            hint="choose another output_dir, or mend the rights of the folder above it",
        )


def _last_time(folder: Path) -> float:
    """Seconds on the last whole line of metrics.jsonl; a torn line (power cut) is cut off."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return 0.0
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        file.write_bytes(whole)
    for line in reversed(whole.splitlines()):
        try:
            return float(json.loads(line)["time"])
        except (ValueError, KeyError):
            continue
    return 0.0


def is_done(config: StageConfig) -> bool:
    """Whether the run folder holds the result of this very recipe. Writes nothing.

    Raises:
        AlignError: an input is not there, or the folder holds something else.
    """
    return _examine(config)[1]


def _examine(config: StageConfig) -> tuple[Identity, bool]:
    """What a run of this config is made of, and whether it is there already."""
    output, identity = output_path(config), identify(config)
    check_inputs(identity)
    found = standing(output, identity)
    if found.state not in ("absent", "unchanged"):
        refuse(output, found)
    return identity, found.state == "unchanged"


def _prepare(
    config: StageConfig, name: str, quiet: bool, origins: Mapping[str, str] | None
) -> RunFolder | None:
    """Decide what is to be done at `output_dir`; None when the run is there already.

    Raises:
        AlignError: the folder holds another run; nothing was written then.
    """
    output = output_path(config)
    identity, done = _examine(config)
    if done:
        _tidy(output)
        return None
    partial = partial_path(output)
    kept = read_json(partial / "lineage.json") or {}
    if partial.exists() and kept.get("fingerprint") != identity.fingerprint:
        mark = str(kept.get("fingerprint", "unknown"))[:8]
        aside = free_name(partial.with_name(f"{partial.name}-{mark}"))
        rename(partial, aside)
        if not quiet:
            say(f"{name}: the unfinished run of another recipe was moved to {aside}")
    elif "outputs" in kept:
        # Stopped between the last file and the new name: nothing is left to do but that.
        publish(partial, output)
        return None
    check_push(config)
    return RunFolder(config, name=name, quiet=quiet, identity=identity, origins=origins)


def run_stage(
    config: StageConfig,
    *,
    name: str | None = None,
    inputs: Mapping[str, str] | None = None,
    origins: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> Path:
    """Run one stage, whatever its kind, and return its complete run folder.

    Does nothing when the folder already holds the result of this very recipe, goes on with an
    unfinished run of it, and refuses a folder that holds anything else.

    Args:
        config: a stage's config.
        name: what the stage is called in messages (its kind when unset).
        inputs: dotted key -> name of the pipeline stage that the input came from, for lineage.json.
        origins: dotted key -> where its value came from (`Loaded.origins`), for origins.json.
        quiet: print no notes.

    Raises:
        AlignError: something the user has to mend. `Stopped` after SIGTERM or Ctrl-C. `NotPushed`
            after the run is complete, where its recipe asks for a push that failed.
    """
    stage = str(config.model_dump(include={"stage"})["stage"])
    name, output = name or stage, output_path(config)
    check_world(config.launch)
    _check_sharding(config)
    with stoppable(), locked(output) if is_main() else nullcontext():
        opened, to_do = on_main(lambda: _prepare(config, name, quiet, origins))
        if not to_do:
            if is_main() and not quiet:
                say(f"{name}: nothing to do, {output} is complete and unchanged")
            push_complete(config, output, name)
            return output
        folder = opened or RunFolder(config, name=name, quiet=quiet)
        if inputs:
            folder.trace("stages", dict(inputs))
        if folder.attempt > 1 and not quiet and folder.is_main:
            say(f"{name}: going on with {folder.path} (attempt {folder.attempt})")
        keep_freed_memory()
        _run_in(folder)
        push_complete(config, output, name)
        return output


def _check_sharding(config: StageConfig) -> None:
    """Refuse what a launcher's FSDP or ZeRO-3 does not allow; those of the recipe were told when it was read."""
    found = sharding_troubles(config, sharding_in_force())
    problems = [Problem(one.message, ".".join(map(str, one.key)), one.hint) for one in found]
    if problems:
        raise AlignError(*problems)


def _run_in(folder: RunFolder) -> Path:
    module = importlib.import_module(STAGES[folder.stage].partition(":")[0])
    try:
        module.run(folder.config, folder)
        return folder.finish()
    except (KeyboardInterrupt, AlignError):
        _leave(folder)
        raise
    except Exception as error:
        log = folder.record_failure(error)
        where = str(folder.path)
        if folder.path.exists() and _disk_is_full(error, folder.path):
            hint = "free some space; the same command goes on"
            fail("the disk is full", where=where, hint=hint)
        if log is None:
            raise
        if type(error).__name__ == "OutOfMemoryError":
            fail("the GPU ran out of memory", where=where, hint=f"{SMALLER} (traceback in {log})")
        error.add_note(f"The traceback is in {log}; the same command goes on from there.")
        raise


def _leave(folder: RunFolder) -> None:
    """After a refusal or a stop: keep what a later attempt can use, leave nothing else behind."""
    if not folder.is_main or not folder.path.exists():
        return
    if folder.wrote_something():
        folder.pause()
    else:
        folder.discard()


def _disk_is_full(error: Exception, path: Path) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch reports a full disk as a RuntimeError about the file's position.
    return isinstance(error, RuntimeError) and shutil.disk_usage(path).free < 2**20


__all__ = [
    "RunFolder",
    "Stopped",
    "is_done",
    "output_path",
    "partial_path",
    "recipe_text",
    "run_stage",
]
