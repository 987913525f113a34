"""One writer per run folder: a file lock that a killed process cannot leave behind."""

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.durable import read_json
from align.errors import fail


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder (`.<name>.lock` beside it) for the time of a `with` block.

    The kernel gives the lock free when its holder ends, however it ends; the file only says who
    holds it. Folders that were made for the lock file and are empty in the end are removed.

    Raises:
        AlignError: another command holds it, or the place cannot be written.
    """
    file = _lock_file(folder)
    made = [parent for parent in file.parents if not parent.exists()]
    handle = _acquire(file, folder)
    try:
        yield
    finally:
        # Removed before it is given free: whoever waits on the old file notices and makes its own.
        file.unlink(missing_ok=True)
        os.close(handle)
        for parent in made:
            try:
                parent.rmdir()
            except OSError:
                break


def writer_of(folder: Path) -> int | None:
    """The process of this machine that is writing a run folder now; None where none is known.

    The lock is not touched: to ask must not keep a command that starts at this moment out.
    """
    holder = read_json(_lock_file(folder))
    if not isinstance(holder, dict) or holder.get("host") != platform.node():
        return None
    try:
        os.kill(int(holder["pid"]), 0)
    except PermissionError:  # it runs, as another user
        return int(holder["pid"])
    except (KeyError, TypeError, ValueError, OSError):
        return None
    return int(holder["pid"])


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _acquire(file: Path, folder: Path) -> int:
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            fail(
                f"cannot be written: {error.strerror}",
                where=str(folder),
                hint="write elsewhere (`output_dir`, --output), or mend the rights of the folder above it",
            )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            _refuse(file, folder)
        if _is_current(handle, file):
            _sign(handle)
            return handle
        os.close(handle)


def _sign(handle: int) -> None:
    """Write who holds the lock. On a full disk it holds without a name."""
    try:
        os.truncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
    except OSError:
        return


def _is_current(handle: int, file: Path) -> bool:
    """Whether the locked file is still the one at this path (its last holder removes it)."""
    try:
        return os.fstat(handle).st_ino == file.stat().st_ino
    except FileNotFoundError:
        return False


def _refuse(file: Path, folder: Path) -> None:
    holder = read_json(file) or {}
    fail(
        "is being written by another command "
        f"(process {holder.get('pid', '?')} on {holder.get('host', '?')})",
        where=str(folder),
        hint="wait until it is through, or stop it: nothing is lost",
    )
