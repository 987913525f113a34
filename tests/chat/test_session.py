"""What a model is asked next, and what is saved."""

import json

import pytest

from align.chat.session import Reply, Session, Turn, in_words
from align.errors import AlignError


def reply(text: str, end="stop") -> Reply:
    return Reply(text, end, 3, 10)


@pytest.fixture
def session() -> Session:
    made = Session({"a": "Be brief.", "b": None})
    made.turns.append(Turn("Hello", {"a": reply("Hi"), "b": reply("Good day")}))
    return made


def test_each_model_sees_its_own_answers(session):
    assert session.messages("a", "More?") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "More?"},
    ]
    assert [turn["content"] for turn in session.messages("b")] == ["Hello", "Good day"]


def test_a_turn_without_an_answer_is_not_shown_again(session):
    session.turns.append(Turn("Silence", {"a": reply("", "interrupted"), "b": reply("Yes")}))
    assert "Silence" not in [turn["content"] for turn in session.messages("a")]
    assert "Silence" in [turn["content"] for turn in session.messages("b")]


def test_undo_and_reset(session):
    assert session.undo().user == "Hello"
    assert session.undo() is None
    session.turns.append(Turn("x"))
    session.reset()
    assert session.turns == []
    assert session.systems == {"a": "Be brief.", "b": None}


def test_saved_rows_are_messages_and_nothing_is_overwritten(session, tmp_path):
    file = tmp_path / "chat.jsonl"
    assert session.save(file) == 1
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["a", "b"]
    assert rows[0]["messages"] == session.messages("a")
    before = file.read_text()
    with pytest.raises(AlignError, match="nothing is overwritten"):
        session.save(file)
    assert file.read_text() == before
    with pytest.raises(AlignError, match="cannot be written"):
        session.save(tmp_path / "none" / "chat.jsonl")
    session.reset()
    with pytest.raises(AlignError, match="nothing to save"):
        session.save(tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


def test_saved_rows_are_read_as_demonstrations(session, tmp_path, tokenizer):
    from align.config.sections import DataSection
    from align.data.rendering import training_rows

    session.save(tmp_path / "chat.jsonl")
    rows = training_rows(DataSection(dataset_name=str(tmp_path / "chat.jsonl")), tokenizer, "sft")
    assert len(rows.train) == 2


def test_an_answer_that_was_cut_says_so():
    assert in_words(reply("x")) is None
    assert "--max-new-tokens" in in_words(reply("x", "length"))
    assert "context of 13 tokens" in in_words(reply("x", "context"))
    assert "Ctrl-C" in in_words(reply("x", "interrupted"))
    assert in_words(reply("")) == "an empty answer"
