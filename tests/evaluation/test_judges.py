"""Judges read what a person would read, and whatever a judge does wrong names the row."""

import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import AlignError, fail
from align.evaluation import judges
from align.evaluation.judges import ask, contains, exact, final_number, number, pattern


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She has 5 apples", "5"),
        ("48/2 = 24 and 48+24 = 72\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("It costs $1,234.50.", "1234.5"),
        ("between -3 and 5-3", "3"),
        ("x = \u22127", "-7"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("3 - 7", "7"),
        ("12%", "12"),
        ("The answer is 42.", "42"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("1,234,567.89 in all", "1234567.89"),
        (".5", "0.5"),
        ("**18**", "18"),
        ("#### 7 of them\nThat was task 12", "7"),
        ("####\n9", "9"),
        ("20kg", "20"),
    ],
)
def test_the_final_number(text, value):
    assert final_number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "none", "###", "#### eight", "x1", "v1.2"])
def test_no_number(text):
    assert final_number(text) is None


@given(st.integers(-(10**12), 10**12), st.integers(0, 99))
def test_every_written_number_is_read_back(whole, cents):
    text = f"{whole:,}.{cents:02d}"
    assert final_number(f"so it is {text} dollars.") == Decimal(text.replace(",", ""))


def test_number_judges_by_value():
    row = {"question": "?", "answer": "2 + 2 = 4\n#### 4"}
    assert number(row, "It is 4.00.") == {"score": 1.0, "answered": 1.0}
    assert number(row, "It is 5.") == {"score": 0.0, "answered": 1.0}
    assert number(row, "Nobody knows.") == {"score": 0.0, "answered": 0.0}
    with pytest.raises(AlignError, match="'many' holds no number"):
        number({"answer": "many"}, "4")


@pytest.mark.parametrize("column", ["answer", "label", "gold", "completion"])
def test_the_columns_of_the_true_answer(column):
    assert number({column: 12}, "12") == {"score": 1.0, "answered": 1.0}


def test_messages_as_the_true_answer():
    row = {"completion": [{"role": "assistant", "content": "Paris"}]}
    assert exact(row, "Paris")["score"] == 1


def test_a_row_without_the_true_answer_names_the_columns():
    with pytest.raises(AlignError, match="answer or label or gold or completion") as caught:
        number({"prompt": "?", "solution": "4"}, "4")
    assert "it has prompt, solution" in str(caught.value)
    assert "data.columns" in str(caught.value)


def test_exact_ignores_white_space_only():
    assert exact({"answer": " a  b\n"}, "a b")["score"] == 1
    assert exact({"answer": "a b"}, "A b")["score"] == 0


def test_contains_wants_whole_words_in_any_case():
    assert contains({"answer": "Paris"}, "It is PARIS, of course.")["score"] == 1
    assert contains({"answer": "4"}, "It is 14.")["score"] == 0
    assert contains({"answer": "(a)"}, "So (a).")["score"] == 1
    assert contains({"answer": "New  York"}, "in new\nyork")["score"] == 1
    with pytest.raises(AlignError, match="is empty"):
        contains({"answer": " "}, "x")


def test_pattern_searches():
    assert pattern({"pattern": r"\b4[0-9]\b"}, "It is 42")["score"] == 1
    assert pattern({"pattern": "^42"}, "It is 42") == {"score": 0.0, "timeout": 0.0}
    with pytest.raises(AlignError, match="no regular expression"):
        pattern({"pattern": "("}, "x")
    with pytest.raises(AlignError, match="1001 characters"):
        pattern({"pattern": "a" * 1001}, "x")


def test_a_pattern_that_never_comes_back_is_given_up(monkeypatch):
    monkeypatch.setattr(judges, "SECONDS_LIMIT", 0.1)
    started = time.monotonic()
    assert pattern({"pattern": r"(\w|\w\w)+\d$"}, "a" * 60 + "!") == {"score": 0.0, "timeout": 1.0}
    assert time.monotonic() - started < 5


def refusing(row, completion):
    fail("the row is odd", where="here", hint="mend it")


def raising(row, completion):
    return {"score": row["nothing"]}


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (refusing, "the judge `j`: the row is odd"),
        (raising, "KeyError: 'nothing'"),
        (lambda row, completion: 1.0, "gave 1.0, not a mapping with `score`"),
        (lambda row, completion: {"other": 1}, "not a mapping with `score`"),
        (lambda row, completion: {"score": float("nan")}, "gave nan as `score`"),
        (lambda row, completion: {"score": 1, "x": float("inf")}, "gave inf as `x`"),
        (lambda row, completion: {"score": "1"}, "gave '1' as `score`, not a number"),
        (lambda row, completion: {"score": None}, "gave None as `score`"),
    ],
)
def test_whatever_a_judge_does_wrong_names_the_row(judge, message):
    with pytest.raises(AlignError) as caught:
        ask(judge, "j", {"prompt": "?"}, "answer", "row 7")
    assert message in str(caught.value)
    assert str(caught.value).startswith("row 7: ")


def test_numbers_of_any_kind_become_floats():
    import numpy as np

    verdict = ask(lambda *_: {"score": np.float32(0.5), "ok": True}, "j", {}, "", "row 1")
    assert verdict == {"score": 0.5, "ok": 1.0}
    assert all(type(value) is float for value in verdict.values())
