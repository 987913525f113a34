"""Where answers appear: one model's as it comes, two models' in columns, or plain lines."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from align.chat.session import Reply, conversation_json, in_words
from align.report.terminal import StreamSanitiser, console, sanitise, say

SIDE_BY_SIDE = 96
"""Columns of a terminal from which on two answers stand side by side."""


class Screen(Protocol):
    """What shows the answers to one turn."""

    def begin(self, name: str) -> None:
        """A model begins to answer."""

    def piece(self, text: str) -> None:
        """The next piece of its answer, as the model wrote it."""

    def end(self, reply: Reply) -> None:
        """The answer is over."""

    def finish(self, user: str, replies: Mapping[str, Reply]) -> None:
        """All models have answered."""


def screen_for(names: Sequence[str], *, as_json: bool = False) -> Screen:
    """The screen that fits: decided for every turn, because terminals change their width."""
    out = console(results=True)
    if as_json:
        return JsonLines()
    if len(names) == 2 and out.is_terminal and not out.is_dumb_terminal:
        if shutil.get_terminal_size().columns >= SIDE_BY_SIDE:
            return Columns(names)
    return Stream(headings=len(names) > 1)


class Stream:
    """Each answer as it comes, one model under the other."""

    def __init__(self, *, headings: bool) -> None:
        self.headings, self.out = headings, console(results=True)
        self.clean = StreamSanitiser()

    def begin(self, name: str) -> None:
        """Write the model's name where there are two."""
        if self.headings:
            self.out.print(Text(f"[{sanitise(name)}]", style="bold cyan"))
        self.clean = StreamSanitiser()

    def piece(self, text: str) -> None:
        """Write a piece; the terminal wraps."""
        self._write(self.clean.feed(text))

    def end(self, reply: Reply) -> None:
        """Close the line, and say where the answer did not end by itself."""
        self._write(self.clean.finish() + "\n")
        note = in_words(reply)
        if note:
            say(f"[{note}]", style="dim")

    def finish(self, user: str, replies: Mapping[str, Reply]) -> None:
        """A blank line between turns, in a terminal."""
        if self.out.is_terminal:
            self.out.print()

    def _write(self, text: str) -> None:
        # rich would expand tabs and break words: text goes out as it is, for copying and for pipes.
        self.out.file.write(text)
        self.out.file.flush()


class JsonLines:
    """One JSON object for every turn."""

    def begin(self, name: str) -> None:
        """Nothing yet."""

    def piece(self, text: str) -> None:
        """Nothing yet."""

    def end(self, reply: Reply) -> None:
        """Nothing yet."""

    def finish(self, user: str, replies: Mapping[str, Reply]) -> None:
        """Write the turn."""
        print(conversation_json(user, replies), flush=True)


class Columns:
    """Two answers side by side: their ends while they come, all of them when both are there."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.out = list(names), console(results=True)
        self.texts = dict.fromkeys(names, "")
        self.notes: dict[str, str | None] = dict.fromkeys(names)
        self.current = names[0]
        self.clean = StreamSanitiser()
        self.live: Live | None = None

    def begin(self, name: str) -> None:
        """Open the live view with the first model."""
        self.current, self.clean = name, StreamSanitiser()
        if self.live is None:
            self.live = Live(self, console=self.out, refresh_per_second=12, transient=True)
            self.live.start()

    def piece(self, text: str) -> None:
        """Add a piece; the view is drawn anew a few times a second."""
        self.texts[self.current] += self.clean.feed(text)

    def end(self, reply: Reply) -> None:
        """Close the column."""
        self.texts[self.current] = (self.texts[self.current] + self.clean.finish()).rstrip()
        self.notes[self.current] = in_words(reply)

    def finish(self, user: str, replies: Mapping[str, Reply]) -> None:
        """Take the live view away and print both answers in full."""
        self.close()
        self.out.print(self._table(None))

    def close(self) -> None:
        """Take the live view away."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """The last lines of both, as many as the terminal has room for."""
        yield self._table(max((options.height or 24) - 4, 3))

    def _table(self, lines: int | None) -> Table:
        width = (self.out.width - 3) // 2
        table = Table.grid(padding=(0, 3, 0, 0))
        for _ in self.names:
            table.add_column(width=width - 1, overflow="fold")
        table.add_row(*(Text(sanitise(name), style="bold cyan") for name in self.names))
        table.add_row(*(Rule(style="dim") for _ in self.names))
        table.add_row(*(self._cell(name, width - 1, lines) for name in self.names))
        return table

    def _cell(self, name: str, width: int, lines: int | None) -> Text:
        cell = Text(self.texts[name])
        note = self.notes[name]
        if note:
            cell.append(f"\n[{note}]", style="dim")
        if lines is None:
            return cell
        wrapped = cell.wrap(self.out, width, overflow="fold")
        return Text("\n").join(wrapped[-lines:])


def is_interactive() -> bool:
    """Whether somebody sits at both ends of the line."""
    return sys.stdin.isatty() and console(results=True).is_terminal
