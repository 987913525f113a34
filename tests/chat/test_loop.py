"""A session with models that answer from a script: commands, turns, limits, pipes."""

import io
import json

import pytest

from align.chat import loop
from align.chat.loop import Chat
from align.chat.session import Reply, Session
from align.chat.speaker import Manner
from align.errors import AlignError, fail


class Scripted:
    """Answers with what it was asked; has room for a few messages."""

    def __init__(self, name: str, room: int = 9) -> None:
        self.name, self.room = name, room
        self.asked: list[list[dict[str, str]]] = []
        self.places: list[tuple[int, int]] = []
        self.stops = False

    def prompt(self, messages):
        if len(messages) > self.room:
            fail("the chat has no room", where=self.name)
        if messages[0]["content"] == "forbidden":
            fail("the template knows no system turn")
        self.asked.append(messages)
        return [len(messages)]

    def answer(self, ids, manner, *, place, on_text):
        self.places.append(place)
        text = f"{self.name} {self.asked[-1][-1]['content']} {place[1]}"
        if self.stops:
            on_text("half")
            return Reply("half", "interrupted", 1, 1)
        for piece in text.split(" "):
            on_text(piece + " ")
        return Reply(text, "stop", 3, 1)


@pytest.fixture
def talk(monkeypatch, capsys):
    def start(*lines: str, names=("m",), interactive=True, as_json=False, room=9):
        speakers = [Scripted(name, room) for name in names]
        chat = Chat(speakers, Session(dict.fromkeys(names)), Manner(), as_json=as_json)
        chat.interactive = interactive
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        given = iter(lines)

        def read(_: str) -> str:
            line = next(given, None)
            if line is None:
                raise EOFError
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(loop, "_line_editing", lambda: None)
        chat.run()
        return chat, *capsys.readouterr()

    return start


def test_a_pipe_gives_plain_lines(talk):
    chat, out, err = talk("one", "", "two", interactive=False)
    assert out == "m one 0 \nm two 0 \n"
    assert err == ""
    assert [turn["content"] for turn in chat.speakers[0].asked[-1]] == ["one", "m one 0", "two"]
    assert chat.speakers[0].places == [(0, 0), (1, 0)]


def test_a_pipe_with_two_models_names_them(talk):
    _, out, _ = talk("one", names=("a", "b"), interactive=False)
    assert out == "[a]\na one 0 \n[b]\nb one 0 \n"


def test_json_is_one_object_a_turn(talk):
    _, out, _ = talk("one", "two", names=("a", "b"), interactive=False, as_json=True)
    first, second = map(json.loads, out.splitlines())
    assert first["user"] == "one"
    assert second["answers"]["b"]["text"] == "b two 0"
    assert second["answers"]["b"]["end"] == "stop"


def test_undo_retry_and_reset(talk):
    chat, _, err = talk("one", "two", "/undo", "/retry")
    assert "taken back: two" in err
    assert [turn.user for turn in chat.session.turns] == ["one"]
    assert chat.session.turns[0].replies["m"].text == "m one 1"
    assert chat.speakers[0].places[-1] == (0, 1)
    chat, _, err = talk("one", "/reset", "two")
    assert len(chat.speakers[0].asked[-1]) == 1
    assert "begins anew" in err


def test_retry_keeps_the_old_answer_where_there_is_no_new_one(talk, monkeypatch):
    monkeypatch.setattr(
        Scripted, "answer", lambda self, *_, **__: Reply("", "interrupted", 0, 1), raising=True
    )
    chat, _, _ = talk()
    chat.session.turns.append(kept := loop.Turn("one", {"m": Reply("old", "stop", 1, 1)}))
    chat.take("/retry")
    assert chat.session.turns == [kept]


def test_a_system_text_is_set_shown_and_taken_away(talk):
    chat, _, err = talk("/system", "/system Be brief.", "one", "/system", "/system -", "two")
    assert "m: no system text" in err
    assert "m: Be brief." in err
    with_system = [asked for asked in chat.speakers[0].asked if asked[0]["role"] == "system"]
    assert with_system[-1][0]["content"] == "Be brief."
    assert chat.speakers[0].asked[-1][0]["role"] == "user"


def test_a_system_text_that_the_template_refuses_is_not_kept(talk):
    chat, _, err = talk("/system forbidden", "one")
    assert "no system turn" in err
    assert chat.session.systems == {"m": None}


def test_errors_and_ctrl_c_keep_the_chat(talk):
    chat, _, err = talk("^C", "/rety", "one", "/save", "/undo", "/undo")
    assert "Ctrl-D or /exit leaves" in err
    assert "did you mean `/retry`?" in " ".join(err.split())
    assert "name of a file is missing" in err
    assert "no turn to take back" in err
    assert chat.session.turns == []


def test_a_turn_without_room_is_refused_for_both_and_not_kept(talk):
    chat, _, err = talk("one", "two", names=("a", "b"), room=1)
    assert "no room" in err
    assert [turn.user for turn in chat.session.turns] == ["one"]
    assert len(chat.speakers[1].places) == 1


def test_in_a_pipe_the_first_error_ends_the_chat(talk, capsys):
    with pytest.raises(AlignError, match="no room"):
        talk("one", "two", interactive=False, room=1)
    assert "line 2 of the input" in capsys.readouterr().err
    with pytest.raises(AlignError, match="no such command"):
        talk("/etc/passwd is what?", interactive=False)


def test_two_slashes_begin_a_turn_with_one(talk):
    chat, _, _ = talk("//etc is what?", interactive=False)
    assert chat.session.turns[0].user == "/etc is what?"


def test_ctrl_c_stops_one_answer_and_its_text_stays(talk, monkeypatch):
    chat, _, _ = talk(names=("a", "b"))
    chat.speakers[0].stops = True
    chat.take("one")
    replies = chat.session.turns[0].replies
    assert replies["a"].text == "half"
    assert replies["b"].text == "b one 0"
    assert chat.session.messages("a")[-1]["content"] == "half"


def test_ctrl_c_beside_an_answer_keeps_the_chat_too(talk, monkeypatch):
    def interrupted(self, messages):
        raise KeyboardInterrupt

    monkeypatch.setattr(Scripted, "prompt", interrupted)
    chat, _, err = talk("one", "/help")
    assert "(stopped; Ctrl-D" in err
    assert "/reset" in err
    assert chat.session.turns == []


def test_in_a_pipe_ctrl_c_ends_the_chat(talk):
    chat, _, _ = talk(interactive=False)
    chat.speakers[0].stops = True
    with pytest.raises(KeyboardInterrupt):
        chat.take("one")


def test_exit_leaves(talk):
    chat, _, _ = talk("one", "/exit", "two")
    assert len(chat.session.turns) == 1


def test_a_line_may_go_on(talk):
    chat, _, _ = talk("one \\", "two")
    assert chat.session.turns[0].user == "one \ntwo"


def test_help_names_every_command(talk):
    _, _, err = talk("/help")
    for command in ("/reset", "/system", "/undo", "/retry", "/save", "/exit", "Ctrl-C"):
        assert command in err


def test_text_that_is_no_utf_8_is_refused(talk):
    with pytest.raises(AlignError, match="UTF-8"):
        talk("caf\udce9", interactive=False)
