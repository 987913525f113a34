"""Writes the report, only where it would differ, and never over a file that is no report of ours.

What a report is made of is hashed into its head, so the report of an unchanged run is known to be
up to date without drawing it again. Importing this module imports no template engine.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from align.durable import write_text
from align.errors import fail
from align.report.html.gather import Run, gather
from align.resources import display
from align.runs import ORIGINS_FILE
from align.status import PIPELINE_FILE

NAME = "report.html"

HEAD = 2048
"""Bytes at the beginning of a file in which a report says that it is one."""

STAMP = re.compile(r'<meta name="align-report" content="([0-9a-f]{64})">')

MADE_OF = (
    *("lineage.json", "summary.json", "environment.json", "metrics.jsonl", "recipe.yaml"),
    ORIGINS_FILE,
)
"""Files of a run folder that the page is made of; the artifact's hashes stand in lineage.json."""


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Bring the report of a run up to date and return its place.

    Args:
        folder: a pipeline's folder, or a run folder.
        output: the file to write; `report.html` in the folder when None.

    Raises:
        AlignError: there is no run, or something else lies where the report belongs.
    """
    run = gather(folder)
    target = (output or run.folder / NAME).expanduser().absolute()
    stamp = _stamp(run)
    if _standing(target) == stamp:
        return target
    from align.report.html.page import render

    page = render(run, stamp)
    try:
        write_text(target, page, flush=False)
    except OSError as error:
        fail(
            f"the report cannot be written: {error.strerror}",
            where=display(target),
            hint="name another file with --output",
        )
    return target


def _standing(target: Path) -> str | None:
    """The stamp of the report that is there; None where there is no file yet."""
    if not target.exists():
        return None
    hint = "name another file with --output, or move that one away"
    if not target.is_file():
        fail("is a folder, not a file", where=display(target), hint=hint)
    with target.open("rb") as handle:
        head = handle.read(HEAD).decode("utf-8", errors="replace")
    found = STAMP.search(head)
    if found is None and head:
        fail("holds something that is no report of align", where=display(target), hint=hint)
    return found[1] if found else None


def _stamp(run: Run) -> str:
    """sha256 of everything that the page is made of, the code of this package included."""
    digest = hashlib.sha256()
    for part in _parts(run):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _parts(run: Run) -> Iterator[bytes]:
    for file in sorted(Path(__file__).parent.iterdir()):
        if file.is_file():
            yield file.read_bytes()
    yield run.title.encode()
    yield _content(run.folder / PIPELINE_FILE)
    for stage in run.stages:
        yield f"{stage.name} {stage.state} {stage.reasons}".encode("utf-8", "surrogatepass")
        for name in MADE_OF:
            yield _content(stage.home / name)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
