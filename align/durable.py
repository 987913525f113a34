"""Writing that survives a power cut: a file or a folder is there in full, or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """Flush every file below `root`, then the folders that hold them."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def write_text(path: Path, text: str, *, flush: bool = True) -> None:
    """Replace a file by `text` in one step: readers see the old content or the new one.

    Without `flush` that holds for a killed process but not for a power cut.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        if flush:
            sync(temporary)
        temporary.replace(path)
        if flush:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, flush: bool = True) -> None:
    """Replace a file by `value` as indented JSON in one step."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    write_text(path, text, flush=flush)


def read_json(path: Path) -> Any:
    """The JSON value of a file; None where there is no such file or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder and flush the folders that held and hold it."""
    source.rename(target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def free_name(wanted: Path) -> Path:
    """`wanted`, or the first of `wanted-2`, `wanted-3`, ... that does not exist yet."""
    candidate, number = wanted, 1
    while candidate.exists():
        number += 1
        candidate = wanted.with_name(f"{wanted.name}-{number}")
    return candidate


def folder_size(root: Path) -> int:
    """Bytes of all files below `root`."""
    return sum(
        (Path(folder) / name).lstat().st_size
        for folder, _, files in os.walk(root)
        for name in files
    )
