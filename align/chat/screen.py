"""Where answers appear: one model's as it comes, two models' in columns, or plain lines."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.cells import cell_len
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
    steerable = out.is_terminal and not out.is_dumb_terminal
    if len(names) == 2 and steerable and out.width >= SIDE_BY_SIDE:
        return Columns(names)
    return Stream(headings=len(names) > 1)


class WordWrap:
    """Breaks lines between words for a text that comes in pieces; longer words the terminal breaks."""

    def __init__(self, width: int) -> None:
        self.width, self.column, self.word = width, 0, ""

    def feed(self, text: str) -> str:
        """The next piece, up to the last word that may still go on."""
        out = []
        for part in re.split(r"(\s)", self.word + text):
            if part.isspace():
                out.append(self._placed())
                out.append(part)
                self.column = 0 if part == "\n" else self.column + (8 if part == "\t" else 1)
            else:
                self.word = part
        return "".join(out)

    def finish(self) -> str:
        """The last word."""
        return self._placed()

    def _placed(self) -> str:
        word, self.word = self.word, ""
        size = cell_len(word)
        breaks = self.column > 0 and self.column + size > self.width and size <= self.width
        self.column = size if breaks else self.column + size
        return "\n" + word if breaks else word


class Stream:
    """Each answer as it comes, one model under the other."""

    def __init__(self, *, headings: bool) -> None:
        self.headings, self.out = headings, console(results=True)
        self.clean = StreamSanitiser()
        self.wrap = WordWrap(self.out.width) if self.out.is_terminal else None

    def begin(self, name: str) -> None:
        """Write the model's name where there are two."""
        if self.headings:
            self.out.print(Text(f"[{sanitise(name)}]", style="bold cyan"))
        self.clean = StreamSanitiser()
        self.wrap = WordWrap(self.out.width) if self.out.is_terminal else None

    def piece(self, text: str) -> None:
        """Write a piece; in a terminal its last word waits for its end."""
        self._write(self.clean.feed(text))

    def end(self, reply: Reply) -> None:
        """Close the line, and say where the answer did not end by itself."""
        self._write(self.clean.finish())
        self.out.file.write((self.wrap.finish() if self.wrap else "") + "\n")
        self.out.file.flush()
        note = in_words(reply)
        if note:
            say(f"[{note}]", style="dim")

    def finish(self, user: str, replies: Mapping[str, Reply]) -> None:
        """A blank line between turns, in a terminal."""
        if self.out.is_terminal:
            self.out.print()

    def _write(self, text: str) -> None:
        # Not through rich, which would expand tabs and end every piece of text with a line.
        self.out.file.write(self.wrap.feed(text) if self.wrap else text)
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
