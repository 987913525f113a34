"""What a command says when it stops: a mistake to mend, or an unexpected error."""

import errno
import json
import os
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from align.errors import AlignError, Problem
from align.secrets import scrub, scrubbed

MOST_LINES = 44
"""Lines of one error: it must fit on a screen."""


def print_json(value: Any) -> None:
    """A value as JSON on stdout."""
    print(json.dumps(scrubbed(value), indent=2, ensure_ascii=False, default=str))


def problems_json(problems: Iterable[Problem]) -> dict[str, Any]:
    """What `--json` says of a refused command."""
    from align.config.problems import as_json

    return {"ok": False, "problems": [as_json(problem) for problem in problems]}


def print_problems(error: AlignError) -> None:
    """An error on one screen, on stderr; of several processes the first tells it in full."""
    from align.report.terminal import say

    problems = list(error.problems)
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        said = f"process {rank}: {problems[0] if problems else error}"
        say(scrub(said.splitlines()[0]), style="red")
        return
    if len(problems) > 1:
        say(f"{len(problems)} problems", style="bold red")
    lines = 1
    for number, problem in enumerate(problems):
        where = f"{problem.where}: " if problem.where else ""
        head = f"{'error: ' if len(problems) == 1 else ''}{where}{problem.message}"
        say(scrub(head), style="red")
        if problem.hint:
            say(scrub(f"    {problem.hint}"))
        lines += 2 if problem.hint else 1
        left = len(problems) - number - 1
        if lines >= MOST_LINES and left > 1:
            say(f"... and {left} more")
            break


FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def mistake_in(error: BaseException) -> Problem | None:
    """What a user can mend in an error of the system or a library; None for what is unexpected.

    Libraries pass some errors of the system on as text (safetensors, torch), hence the words.
    """
    text, place = str(error), None
    if isinstance(error, OSError):
        place = str(error.filename) if error.filename else None
        if error.errno in DENIED:
            read_only = error.errno == errno.EROFS
            message = "is on a disk that may only be read" if read_only else "permission denied"
            return Problem(message, place, "mend its rights, or name another")
        if error.errno == errno.ENAMETOOLONG:
            return Problem("is longer than the name of a file can be", place, "give another name")
    full = isinstance(error, OSError) and error.errno in FULL
    if full or "No space left on device" in text or "Disk quota exceeded" in text:
        hint = "make room (`align plan` says how much is needed); the same command goes on from what is complete"
        return Problem("the disk is full, or your quota is used up", place, hint)
    if type(error).__name__ == "SafetensorError":
        hint = "`align runs FOLDER` names runs with damaged files; run the stage again, or copy the model anew"
        return Problem(f"a .safetensors file is damaged ({text})", place, hint)
    return None


def answer(error: AlignError, *, as_json: bool = False) -> int:
    """Show an error on one screen, with `as_json` as JSON on stdout too; returns the exit code."""
    if as_json:
        print_json(problems_json(error.problems))
    print_problems(error)
    return error.exit_code


def crash(error: Exception) -> int:
    """Say that something unexpected happened, and where the traceback is; returns the exit code."""
    from align.report.terminal import say

    # A stage leaves the traceback in its own log, and a note that says where.
    notes = [note for note in getattr(error, "__notes__", []) if "traceback is in" in note]
    if not notes:
        handle, log = tempfile.mkstemp(prefix="align-", suffix=".log")
        os.close(handle)
        Path(log).write_text(scrub("".join(traceback.format_exception(error))), encoding="utf-8")
        notes = [f"The traceback is in {log}; ALIGN_DEBUG=1 prints it."]
    first = str(error).strip().partition("\n")[0]
    rank = os.environ.get("RANK")
    place = f" in process {rank}" if rank else ""
    say(f"unexpected error{place}: {type(error).__name__}: {scrub(first)[:300]}", style="red")
    for note in notes:
        say(f"    {note}")
    return 1
