"""How far a stage is: a live bar in a terminal, plain lines elsewhere.

Shows stage, steps, figures such as the loss, tokens per second, time left and memory. Imports no
torch; memory of a GPU is read only where torch is loaded already.
"""

import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from align.environment import is_main
from align.report.terminal import console, say

LINES = 10
"""Plain lines for a whole stage, at least ..."""

QUIET_SECONDS = 60.0
"""... and never longer without a line than this."""


def duration(seconds: float) -> str:
    """`0:07`, `12:30` or `3:02:01`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short(number: float) -> str:
    """`870`, `12.3k`, `4.1M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size * 0.99995:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes as `870 B`, `12.3 MB`, `4.1 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale * 0.99995:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f} B"


def memory() -> str:
    """The GPU memory torch holds at its peak, or this process's resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"GPU {size(torch.cuda.max_memory_allocated())}"
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return size(pages * resource.getpagesize())
    except (OSError, ValueError, IndexError):
        return size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class Meter:
    """Counts towards a total and shows it. Silent when `quiet`, and in all but the main process.

    Args:
        total: steps, prompts, rows, ...
        stage: the name in front.
        unit: what is counted, in the plural.
        done: what an earlier attempt had finished; it does not count for the speed.
    """

    def __init__(
        self, total: int, stage: str, *, unit: str = "steps", done: int = 0, quiet: bool = False
    ) -> None:
        self.total, self.stage, self.unit = total, stage, unit
        self.done = self._before = done
        self._figures: dict[str, str] = {}
        self._tokens: float | None = None
        self._first_tokens: tuple[float, float] | None = None
        self._started = self._last_line = time.monotonic()
        self._last_done = done
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._quiet = quiet or not is_main()
        screen = console()
        if not self._quiet and screen.is_terminal and not screen.is_dumb_terminal:
            self._start_bar()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def advance(self, count: int = 1, *, tokens: float | None = None, **figures: float) -> None:
        """Count on; `tokens` is the number so far, figures are shown under their names."""
        self.update(self.done + count, tokens=tokens, **figures)

    def update(self, done: int, *, tokens: float | None = None, **figures: float) -> None:
        """Set the count; `tokens` is the number so far, figures are shown under their names."""
        self.done = done
        if tokens is not None:
            self._tokens = tokens
            self._first_tokens = self._first_tokens or (tokens, time.monotonic())
        for name, value in figures.items():
            self._figures[name.replace("_", " ")] = f"{value:.4g}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=self.text())
        elif not self._quiet and self._is_due():
            self._print_line()

    def close(self) -> None:
        """Take the bar away and leave one line that says how it ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._print_line()
        elif not self._quiet and self.done != self._last_done:
            self._print_line()
        self._quiet = True

    def text(self) -> str:
        """The figures, the speed, the time left (or taken) and the memory, in one line."""
        parts = [f"{name} {value}" for name, value in self._figures.items()]
        elapsed = time.monotonic() - self._started
        if self._tokens is not None and self._first_tokens is not None:
            tokens, since = self._first_tokens
            if time.monotonic() - since > 0 and self._tokens > tokens:
                rate = (self._tokens - tokens) / (time.monotonic() - since)
                parts.append(f"{short(rate)} tokens/s")
        worked = self.done - self._before
        if self.done >= self.total:
            parts.append(f"{duration(elapsed)} in all")
        elif worked > 0:
            parts.append(f"{duration(elapsed / worked * (self.total - self.done))} left")
        parts.append(memory())
        return ", ".join(parts)

    def _start_bar(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console(),
            transient=True,
        )
        self._task = self._bar.add_task(
            self.stage, total=self.total, completed=self.done, text=self.text()
        )
        self._bar.start()

    def _is_due(self) -> bool:
        tenth = self.done * LINES // max(self.total, 1)
        passed = tenth > self._last_done * LINES // max(self.total, 1)
        return passed or time.monotonic() - self._last_line > QUIET_SECONDS

    def _print_line(self) -> None:
        self._last_line, self._last_done = time.monotonic(), self.done
        say(f"{self.stage}: {self.done}/{self.total} {self.unit}, {self.text()}")


def progress(
    total: int, stage: str, *, unit: str = "prompts", done: int = 0, quiet: bool = False
) -> Meter:
    """A meter for a `with` block: call `advance` or `update` on it."""
    return Meter(total, stage, unit=unit, done=done, quiet=quiet)
