"""Streamed answers: harmless, wrapped between words, in columns where there is room."""

import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from align.chat import screen
from align.chat.screen import Columns, JsonLines, Stream, WordWrap, screen_for
from align.chat.session import Reply

ATTACK = "a\x1b[31mred\x1b[0m \x1b]52;c;Zm9v\x07 \u202edesrever \x9b2J b\r\nc"


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of a chosen width, and what is written to it."""

    def make(width: int, *, is_terminal: bool = True) -> io.StringIO:
        out = io.StringIO()
        made = Console(file=out, width=width, height=24, force_terminal=is_terminal)
        monkeypatch.setattr(screen, "console", lambda results=False: made)
        return out

    return make


def show(view, text: str, size: int = 1) -> None:
    view.begin("m")
    for first in range(0, len(text), size):
        view.piece(text[first : first + size])
    view.end(Reply(text, "stop", 1, 1))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_no_sequence_comes_together_from_pieces(terminal, size):
    out = terminal(80, is_terminal=False)
    show(Stream(headings=False), ATTACK, size)
    shown = out.getvalue()
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "\x9b" not in shown
    assert "\\x1b[31mred" in shown
    assert shown.endswith("b\nc\n")


def test_columns_show_harmless_text_too(terminal):
    out = terminal(120)
    view = Columns(["m", "other"])
    for name in ("m", "other"):
        view.begin(name)
        for char in ATTACK:
            view.piece(char)
        view.end(Reply(ATTACK, "stop", 1, 1))
    out.truncate(0)
    out.seek(0)
    view.finish("?", {})
    shown = out.getvalue()
    assert "\u202e" not in shown
    assert "\x1b]52" not in shown
    assert "\\x1b]52" in shown
    assert "\x9b" not in shown


def test_two_answers_stand_side_by_side_where_there_is_room(terminal):
    terminal(120)
    assert isinstance(screen_for(["a", "b"]), Columns)
    assert isinstance(screen_for(["a"]), Stream)
    assert isinstance(screen_for(["a", "b"], as_json=True), JsonLines)
    terminal(screen.SIDE_BY_SIDE - 1)
    assert isinstance(screen_for(["a", "b"]), Stream)
    terminal(200, is_terminal=False)
    assert isinstance(screen_for(["a", "b"]), Stream)


def test_the_live_view_shows_the_end_of_a_long_answer_and_the_last_one_all(terminal):
    out = terminal(120)
    view = Columns(["m", "other"])
    view.begin("m")
    view.piece("\n".join(f"line {n}" for n in range(60)))
    live = Console(file=io.StringIO(), width=120, height=24)
    with live.capture() as capture:
        live.print(view)
    assert "line 59" in capture.get()
    assert "line 10 " not in capture.get()
    view.end(Reply("x", "length", 9, 1))
    view.begin("other")
    view.end(Reply("", "stop", 1, 1))
    view.finish("?", {})
    last = out.getvalue().rpartition("other")[2]
    assert "line 10 " in last
    assert "line 59" in last
    assert "cut after 9 tokens" in last
    assert "an empty answer" in last


def test_words_are_not_broken():
    wrap = WordWrap(10)
    text = "one two three four\nfive"
    shown = "".join(wrap.feed(char) for char in text) + wrap.finish()
    assert shown.splitlines() == ["one two ", "three four", "five"]


@given(
    st.text(alphabet="ab \n", max_size=60),
    st.integers(3, 20),
    st.lists(st.integers(0, 60), max_size=5),
)
def test_wrapping_adds_line_breaks_only_and_does_not_depend_on_the_pieces(text, width, cuts):
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(places)]
    results = []
    for parts in (pieces, [text]):
        wrap = WordWrap(width)
        results.append("".join(map(wrap.feed, parts)) + wrap.finish())
    assert results[0] == results[1]
    assert results[0].replace("\n", "") == text.replace("\n", "")
    for word in text.split():
        if len(word) <= width:
            assert word in results[0]
