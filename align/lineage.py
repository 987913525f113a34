"""Where a result comes from: content hashes of inputs and code, and the fingerprint of a stage.

A fingerprint says "the same result would come out again". It covers the resolved recipe, the
content of every input (not its path) and the code of the rooms that the stage uses. It leaves out
what only changes how long the stage runs, what it prints, or where it writes.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from align.config.paths import DATA_KEYS, MODEL_KEYS
from align.config.sections import DataSection, StageConfig
from align.data.fingerprint import describe_sources
from align.durable import read_json, write_json
from align.environment import library_version
from align.registry import code_file
from align.resources import find_path
from align.secrets import scrubbed

NOT_IN_RESULT = (
    "output_dir",
    "launch.accelerate",
    "data.dataset_num_proc",
    "trainer.dataloader_num_workers",
    "trainer.gradient_checkpointing",
    "trainer.per_device_eval_batch_size",
    "trainer.logging_steps",
    "trainer.save_steps",
    "trainer.save_total_limit",
    "trainer.report_to",
    "generation.generation_batch_size",
    "scorer.score_batch_size",
    "score_batch_size",
)
"""Keys that change the speed, the log or the place of a run, and not its artifact."""

BATCH = (
    "trainer.per_device_train_batch_size",
    "trainer.gradient_accumulation_steps",
    "launch.num_processes",
)
"""Only their product, the rows per optimizer step, is in the fingerprint: how a step is split
changes rounding (and the masks of dropout) alone, and may have to change when memory runs out."""

PUSH_KEYS = "hub."
"""Keys below it say what becomes of a complete run; only the stage `push` is made of them."""

CODE_KEYS = "scorer.reward_funcs."
"""Keys below it are names of reward functions, some of them `FILE.py:NAME`."""

TEMPLATE_KEY = "model.chat_template_path"
"""Names a Jinja file, or one that ships under a short name."""

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""The files of a model folder that decide what it answers (a README does not)."""

ROOMS = {
    "sft": ("data", "models", "training"),
    "reward": ("data", "models", "training", "generation", "evaluation"),
    "dpo": ("data", "models", "training"),
    "ppo": ("data", "models", "training", "generation", "evaluation", "tiny", "ppo"),
    "sample": ("data", "models", "generation", "evaluation", "tiny"),
    "average": ("models", "averaging"),
    "eval": ("data", "models", "generation", "evaluation", "tiny"),
    "push": ("hub",),
}
"""Packages whose code decides a stage's result; a stage not named here depends on all of them."""

KEPT = "kept"
"""Folder of a run with the weights of its last checkpoints, for `align average`."""

NOT_IN_CODE = (
    *("training/callbacks.py", "training/checkpoints.py", "tiny/pretrain.py"),
    *("models/merging.py", "models/source.py"),
    *("evaluation/comparison.py", "evaluation/comparison_view.py"),
)
"""Files of those packages that watch, save or prepare, and change no result."""

LIBRARIES = ("torch", "transformers", "trl", "peft")
"""Libraries whose version may change a result."""

CACHED_FROM = 64 * 2**20
"""Hashes of files from this size on are remembered; smaller files take milliseconds."""


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "align" / "hashes.json"


def read_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, remembered for large files that did not change since.

    "Did not change" means: the same inode, size, mtime and ctime. ctime cannot be set back, so a
    file that was replaced under its old date is read again.
    """
    stat = path.stat()
    if stat.st_size < CACHED_FROM:
        return read_sha256(path)
    key = str(path.resolve())
    mark = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    known = read_json(_cache_file()) or {}
    if isinstance(known.get(key), dict) and known[key].get("mark") == mark:
        return str(known[key]["sha256"])
    digest = read_sha256(path)
    # A file written within the clock's grain may change once more without a trace.
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2 * 10**9:
        try:
            _cache_file().parent.mkdir(parents=True, exist_ok=True)
            write_json(_cache_file(), known | {key: {"mark": mark, "sha256": digest}})
        except OSError:
            pass  # a cache that cannot be written costs time, not correctness
    return digest


def folder_files(folder: Path, *patterns: str) -> Iterator[Path]:
    """Files below `folder` in a fixed order, no hidden ones; all, or those of some patterns."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and (not patterns or _any(path.name, patterns)):
            yield path


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def file_digests(folder: Path, *patterns: str) -> dict[str, str]:
    """Relative path -> sha256 for the files of a folder."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in folder_files(folder, *patterns)
    }


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def folder_digest(folder: Path, pattern: str | tuple[str, ...] = ()) -> str:
    """sha256 over the names and contents of a folder's files (of those that match, if given)."""
    patterns = (pattern,) if isinstance(pattern, str) else pattern
    return digest_of(file_digests(folder, *patterns))


@cache
def code_digest(stage: str | None = None) -> str:
    """sha256 over the sources that decide a stage's result (all result-relevant ones for None)."""
    root = Path(__file__).parent
    every = sorted({room for rooms in ROOMS.values() for room in rooms})
    rooms = ROOMS.get(stage or "", every)
    own = {None: "*", "eval": "evaluate"}.get(stage, stage)
    paths = [path for room in rooms for path in folder_files(root / room, "*.py", "*.jinja")]
    paths += folder_files(root / "stages", f"{own}.py")
    files = {path.relative_to(root).as_posix(): path for path in paths}
    return digest_of(
        {name: read_sha256(path) for name, path in files.items() if name not in NOT_IN_CODE}
    )


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf of nested mappings and of lists of mappings."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from leaves(item, f"{prefix}.{number}")
    else:
        yield prefix, value


def _model_input(value: str, revision: str | None) -> dict[str, Any]:
    folder = find_path(value)
    if folder is not None and folder.is_dir():
        return {"kind": "model folder", "sha256": folder_digest(folder, MODEL_FILES)}
    return {"kind": "hub model", "revision": revision or "main"}


def _file_input(value: str) -> dict[str, Any]:
    file = find_path(value)
    if file is not None and file.is_file():
        return {"kind": "file", "sha256": file_sha256(file)}
    return {"kind": "shipped"}


def _data_inputs(data: DataSection) -> dict[str, dict[str, Any]]:
    """The files and Hub data sets behind a data section; AlignError where one is not there."""
    found: dict[str, dict[str, Any]] = {}
    for info in describe_sources(data):
        kind = "data file" if info.sha256 else "hub data"
        found[f"data[{len(found)}]"] = {"path": info.path, "kind": kind} | {
            key: value
            for key in ("split", "sha256", "revision", "rows")
            if (value := getattr(info, key)) is not None
        }
    return found


@dataclass(frozen=True)
class Identity:
    """What a run is made of: its inputs by content, and the parts of its fingerprint."""

    inputs: dict[str, dict[str, Any]]
    """Dotted key -> path, kind, and the content's sha256 (or the Hub revision)."""
    parts: dict[str, Any]
    """Stage, recipe, inputs and code: what the fingerprint is the hash of."""

    @property
    def fingerprint(self) -> str:
        """sha256 that is equal for two runs which give the same result."""
        return digest_of(self.parts)


def _named_inputs(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The models and files that a flat recipe names."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in recipe.items():
        if not isinstance(value, str):
            continue
        if _any(key, MODEL_KEYS):
            revision = recipe.get("model.model_revision") if key.startswith("model.") else None
            found[key] = {"path": value} | _model_input(value, revision)
        elif key == TEMPLATE_KEY:
            found[key] = {"path": value} | _file_input(value)
    return found


def _kept_inputs(inputs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The kept checkpoints of the runs whose artifacts are averaged, by content."""
    found: dict[str, dict[str, Any]] = {}
    for key, facts in inputs.items():
        artifact = Path(facts["path"]).expanduser()
        kept = (artifact.parent if artifact.name == "artifact" else artifact) / KEPT
        if key.startswith("models.") and kept.is_dir():
            digest = folder_digest(kept, MODEL_FILES)
            found[f"{key}/{KEPT}"] = {"path": str(kept), "kind": "checkpoints", "sha256": digest}
    return found


def _code_inputs(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files behind reward functions `FILE.py:NAME`; in the recipe each stands by its number and function.

    Of code that such a file imports nothing is known.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in [key for key in recipe if key.startswith(CODE_KEYS)]:
        code = code_file(key.removeprefix(CODE_KEYS))
        if code is None:
            continue
        file, function = code
        name = f"{CODE_KEYS[:-1]}[{len(found)}]"
        recipe[f"{name}:{function}"] = recipe.pop(key)
        found[name] = {"path": str(file), "kind": "code"}
        if file.is_file():
            found[name]["sha256"] = file_sha256(file)
    return found


def _evaluations(run: str) -> dict[str, dict[str, Any]]:
    """The evaluations that a model card will speak of, by content."""
    from align.hub.facts import evaluations_of

    return {
        f"evaluation[{place.name}]": {
            "path": str(place),
            "kind": "evaluation",
            "sha256": lineage["outputs"]["artifact"],
        }
        for place, lineage, _ in evaluations_of(Path(run))
    }


def identify(config: StageConfig) -> Identity:
    """Read a config's inputs and say what a run of it is made of.

    Raises:
        AlignError: rows that the recipe names are not there.
    """
    recipe = dict(leaves(scrubbed(config.model_dump(mode="json"))))
    inputs = _named_inputs(recipe) | _code_inputs(recipe)
    if recipe.get("checkpoints") is not None:
        inputs |= _kept_inputs(inputs)
    for key in [key for key in recipe if key in inputs or _any(key, DATA_KEYS)]:
        del recipe[key]
    data = getattr(config, "data", None)
    if isinstance(data, DataSection):
        inputs |= _data_inputs(data)
    if BATCH[0] in recipe:
        recipe["rows per optimizer step"] = math.prod(int(recipe[key]) for key in BATCH)
        if recipe["trainer.train_sampling_strategy"] == "group_by_length":
            # Rows are grouped per process, so the rows of a step depend on how many there are.
            recipe["processes"] = recipe["launch.num_processes"]
    for key in (*NOT_IN_RESULT, *BATCH):
        recipe.pop(key, None)
    if recipe["stage"] == "push":
        inputs |= _evaluations(inputs["run"]["path"])
    else:
        recipe = {key: value for key, value in recipe.items() if not key.startswith(PUSH_KEYS)}
    contents = {
        key: facts.get("sha256") or f"{facts['path']}@{facts.get('revision', '')}"
        for key, facts in inputs.items()
    }
    stage = str(recipe.get("stage"))
    parts = {
        "stage": stage,
        "recipe": recipe,
        "inputs": contents,
        "code": code_digest(stage),
        "libraries": {name: library_version(name) for name in LIBRARIES},
    }
    return Identity(inputs, parts)


def fingerprint(config: StageConfig) -> str:
    """sha256 that is equal for two runs of a stage which give the same result."""
    return identify(config).fingerprint


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two runs' fingerprint parts, one short phrase each."""
    changes = []
    before, after = old.get("recipe", {}), new.get("recipe", {})
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            changes.append(f"{key}: {before.get(key)} -> {after.get(key)}")
    before, after = old.get("inputs", {}), new.get("inputs", {})
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            what = "the rows have" if key.startswith("data[") else f"{key} has"
            changes.append(f"{what} other content")
    if old.get("code") != new.get("code"):
        changes.append("align's code for this stage")
    return changes
