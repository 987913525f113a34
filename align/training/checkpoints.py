"""Checkpoints that are complete or do not count, for transformers' Trainer.

The Trainer writes the files of `checkpoint-N/` one after the other, in place; a process killed in
between leaves a folder that looks like a checkpoint, and a missing or flipped file is loaded
without a word. Here a checkpoint counts only with a manifest (size and sha256 of every file), which
is written last. A checkpoint that does not fit its manifest is moved aside, and the one before is
used.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from torch import distributed

from align.durable import free_name, read_json, rename, sync_tree, write_json
from align.environment import is_main
from align.lineage import KEPT, folder_files, read_sha256
from align.report.terminal import say

MANIFEST = "manifest.json"

CHECKPOINT = re.compile(r"checkpoint-(\d+)")

WEIGHTS = re.compile(r"(adapter_)?(model|config)[\w.-]*\.(safetensors|json)")
"""Files of a checkpoint that make a model or an adapter of it."""

UNWANTED = ("training_args.bin", "zero_to_fp32.py", "zero_to_torch.py")
"""A pickle that may hold access tokens, and DeepSpeed's scripts: resuming reads none of them."""


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders named `checkpoint-N` below `folder`, complete or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def _contents(checkpoint: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(checkpoint).as_posix(): {
            "size": path.stat().st_size,
            "sha256": read_sha256(path),
        }
        for path in folder_files(checkpoint)
        if path.name != MANIFEST
    }


def write_manifest(checkpoint: Path, step: int) -> None:
    """Declare a checkpoint complete: flush its files, then write down their sizes and hashes."""
    for name in UNWANTED:
        (checkpoint / name).unlink(missing_ok=True)
    sync_tree(checkpoint)
    write_json(checkpoint / MANIFEST, {"step": step, "files": _contents(checkpoint)})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where every file fits the manifest."""
    wanted = _manifest_files(checkpoint)
    if wanted is None:
        return "it was never finished"
    for name, facts in wanted.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {facts['size']}"
    # Sizes first: hashing gigabytes is not needed to see that a file was cut short.
    found = _contents(checkpoint)
    for name, facts in wanted.items():
        if found.get(name, {}).get("sha256") != facts["sha256"]:
            return f"{name} has another checksum"
    return None


def _manifest_files(checkpoint: Path) -> dict[str, dict[str, Any]] | None:
    """Size and sha256 of every file by the manifest; None where it is missing or damaged itself."""
    manifest = read_json(checkpoint / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        return None
    whole = all(
        isinstance(facts, dict) and {"size", "sha256"} <= facts.keys() for facts in files.values()
    )
    return files if whole else None


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose every file is as it was written; None where there is none.

    Newer ones that are damaged are renamed to `checkpoint-N.bad` (the Trainer would refuse to write
    that step again otherwise), and it is said what was wrong with them. In a launch of several
    processes the main one looks, and all get its answer.
    """
    found = _search(folder) if is_main() else None
    if distributed.is_available() and distributed.is_initialized():
        answer = [str(found) if found else None]
        distributed.broadcast_object_list(answer, src=0)
        found = Path(answer[0]) if answer[0] else None
    return found


def _search(folder: Path) -> Path | None:
    for checkpoint in checkpoint_folders(folder):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        aside = free_name(checkpoint.with_name(f"{checkpoint.name}.bad"))
        rename(checkpoint, aside)
        say(f"{checkpoint.name} is left out: {problem} (moved to {aside})", style="yellow")
    return None


def keep_newest(folder: Path, limit: int | None, best: str | None = None) -> None:
    """Remove all but the `limit` newest complete checkpoints, and everything damaged.

    Called only after a newer one is complete, so a stop at any moment leaves one to go on from.
    """
    for bad in folder.glob("checkpoint-*.bad*"):
        shutil.rmtree(bad, ignore_errors=True)
    if limit is None:
        return
    complete = [path for path in checkpoint_folders(folder) if (path / MANIFEST).exists()]
    for old in complete[limit:]:
        if best is None or old.name != Path(best).name:
            # Without its manifest it no longer counts, whatever the removal leaves behind.
            (old / MANIFEST).unlink()
            shutil.rmtree(old, ignore_errors=True)


def keep_weights(checkpoints: Path, run: Path, number: int) -> list[Path]:
    """Copy the weights of the `number` newest complete checkpoints to `<run>/kept/`; the oldest comes first."""
    complete = [path for path in checkpoint_folders(checkpoints) if (path / MANIFEST).exists()]
    found = []
    for checkpoint in reversed(complete[:number]):
        target = run / KEPT / checkpoint.name
        shutil.rmtree(target, ignore_errors=True)  # what a killed attempt left
        target.mkdir(parents=True)
        for file in folder_files(checkpoint):
            if file.parent == checkpoint and WEIGHTS.fullmatch(file.name):
                shutil.copyfile(file, target / file.name)
        found.append(target)
    return found
