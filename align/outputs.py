"""A folder that a command writes: complete or absent, and nobody else's."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.durable import rename, sync_tree
from align.errors import fail
from align.locks import locked
from align.stopping import stoppable


@contextmanager
def new_folder(output: Path, doing: str) -> Iterator[Path]:
    """A path beside `output` to write a folder at; it becomes `output` once the block is done, and goes if it fails.

    Args:
        output: absolute; absent, or an empty folder.
        doing: what the path is called while it is written, as in `merging`.

    Raises:
        AlignError: there is something at `output`, or another process writes it.
    """
    partial = output.with_name(f".{output.name}.{doing}")
    with stoppable(), locked(output):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            fail(
                "is there already, and nothing is overwritten",
                where=f"--output {output}",
                hint="choose another folder, or move this one away",
            )
        shutil.rmtree(partial, ignore_errors=True)  # what a killed command left
        try:
            yield partial
            sync_tree(partial)
            if output.exists():
                output.rmdir()
            rename(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
