"""The terminal: where lines go, and how text from models, data and files is made harmless.

Results go to stdout; progress, notes and errors go to stderr, so `--json` and pipes stay clean.
rich itself respects NO_COLOR, TERM=dumb and COLUMNS.
"""

import unicodedata
from functools import cache
from typing import TYPE_CHECKING

from align.secrets import hide_tokens

if TYPE_CHECKING:  # who only needs `sanitise` does not wait for rich
    from rich.console import Console

ALLOWED = frozenset("\n\t\u200c\u200d")
"""Controls that stay: line feed, tab, and the joiners that many scripts and emoji need."""

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that steer a terminal or reorder a line instead of showing a character."""


class _Visible(dict[int, str]):
    """Code point -> what is shown for it; filled as characters turn up (for `str.translate`)."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        shown = char
        if char not in ALLOWED and unicodedata.category(char) in HIDDEN:
            shown = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
        self[code] = shown
        return shown


_VISIBLE = _Visible()


def sanitise(text: str) -> str:
    """Plain text that cannot steer a terminal: every control is shown as an escape instead.

    C0 and C1 controls (so every ESC sequence, OSC included), bidi controls, invisible format
    characters, line separators and lone surrogates become `\\x1b`, `\\u202e` and so on; line feeds
    and tabs stay, CR LF becomes LF. Markup is not touched: put the result into `rich.text.Text`.
    Access tokens become `<secret>`.
    """
    return visible(hide_tokens(text))


def visible(text: str) -> str:
    """`sanitise` without a look for tokens."""
    if text.isprintable():
        return text
    return text.replace("\r\n", "\n").translate(_VISIBLE)


class StreamSanitiser:
    """`sanitise` for a text that comes in pieces: what comes out is what the whole text gives, but for an access
    token that comes in several of them.

    Controls are shown one by one, so no escape sequence can come together from several pieces;
    only a CR waits for the LF that may follow it.
    """

    def __init__(self) -> None:
        self._held = ""

    def feed(self, piece: str) -> str:
        """The next piece, harmless."""
        text = self._held + piece
        self._held = "\r" if text.endswith("\r") else ""
        return sanitise(text.removesuffix(self._held))

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return sanitise(held)


@cache
def console(*, results: bool = False) -> "Console":
    """The console for progress and notes (stderr) or, with `results`, for answers (stdout).

    It reads `sys.stdout` and `sys.stderr` at each print, so redirection after the first call works.
    """
    from rich.console import Console

    return Console(stderr=not results, highlight=False)


def say(text: str, *, style: str = "", results: bool = False) -> None:
    """Print a line or paragraph of sanitised text; the terminal itself wraps long lines."""
    from rich.text import Text

    console(results=results).print(Text(sanitise(text), style=style), soft_wrap=True)
