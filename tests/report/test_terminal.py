"""Text from models and data cannot steer the terminal."""

import os
import unicodedata
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from align.report.terminal import StreamSanitiser, console, sanitise, say

ATTACKS = [
    "\x1b[2J\x1b[H",
    "\x1b]0;title\x07",
    "\x1b]52;c;Y2xpcGJvYXJk\x07",
    "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\",
    "\x1bP+q544e\x1b\\",
    "\x9b31m",
    "\x9d0;title\x9c",
    "safe\rhidden",
    "back\x08\x08space",
    "\u202edesrever",
    "\u2066isolate\u2069",
    "tag\U000e0041",
    "\ufeffbom\u200bzero",
    "line\u2028separator",
    "\ud800lone",
    "\x00nul\x7f",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_attacks_are_shown_and_not_obeyed(text: str) -> None:
    shown = sanitise(text)
    assert shown.isprintable()
    assert "\\" in shown


@given(st.text(st.characters(codec=None)))
def test_nothing_that_steers_is_left(text: str) -> None:
    shown = sanitise(text)
    for char in shown:
        hidden = unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        assert not hidden or char in "\n\t\u200c\u200d"
    assert sanitise(shown) == shown
    shown.encode("utf-8")


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S"])))
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert sanitise(text) == text


def test_lines_tabs_and_joined_emoji_stay() -> None:
    text = "a\n\tb \N{MAN}\u200d\N{WOMAN} می\u200cخواهم"
    assert sanitise(text) == text
    assert sanitise("a\r\nb") == "a\nb"


@pytest.mark.parametrize("text", ["[/foo]", "[red]x", "[link=http://evil]x[/link]", ":smile:"])
def test_markup_is_printed_as_text(text: str, capsys) -> None:
    say(text, results=True)
    assert capsys.readouterr().out == text + "\n"


def test_results_and_notes_go_to_their_streams(capsys) -> None:
    say("answer", results=True)
    say("note", style="red")
    found = capsys.readouterr()
    assert (found.out, found.err) == ("answer\n", "note\n")


def test_a_long_line_is_left_whole(capsys) -> None:
    line = "word " * 60
    say(line)
    assert capsys.readouterr().err == line + "\n"


def test_no_color_and_dumb_terminals_are_respected(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    # Whichever test imported rich first may have done so under another environment.
    plain = Console(file=StringIO(), force_terminal=True, _environ=os.environ)
    plain.print(Text("x", style="red"))
    assert "\x1b[31m" not in plain.file.getvalue()
    assert console().stderr
    assert not console(results=True).stderr


@given(st.lists(st.sampled_from([*"\r\n\x1b[]a\u202e\x9b\x07", "text", *ATTACKS])))
def test_pieces_of_a_text_are_shown_as_the_whole_text_is(pieces: list[str]) -> None:
    clean = StreamSanitiser()
    shown = "".join(map(clean.feed, pieces)) + clean.finish()
    assert shown == sanitise("".join(pieces))


def test_code_that_names_a_password_is_shown_as_it_is():
    code = 'client = Client("https://me:pw@host", api_key=os.environ["KEY"], password=ask())'
    assert sanitise(code) == code
    assert sanitise("hf_abcdefghijklmnopqrstuvwxyz") == "<secret>"
