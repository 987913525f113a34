"""Word differences and the choice of prompts."""

import re
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as some

from align.report.html.answers import LONGEST, SHOWN, _evenly, marks
from align.report.html.text import clean

DEL = re.compile("<del>.*?</del>", re.S)
WORDS = some.lists(
    some.sampled_from(["a", "b <b>", "c.", "\u202e", "&amp;", " ", "\n", "zwei"])
).map(" ".join)


@given(some.one_of(some.text(max_size=80), WORDS), some.one_of(some.text(max_size=80), WORDS))
def test_marks_keep_the_new_text_and_are_the_only_markup(old, new):
    marked = str(marks(old, new))
    bare = re.sub("</?ins>", "", DEL.sub("", marked))
    assert "<" not in bare
    assert unescape(bare) == clean(new)


@pytest.mark.parametrize(
    ("old", "new", "marked"),
    [
        ("the same", "the same", "the same"),
        ("11 plus 10 is 21.", "11 plus 10 is 20.", "11 plus 10 is <del>21</del><ins>20</ins>."),
        (
            "built bridges",
            "Yesterday built bridges.",
            "<ins>Yesterday</ins> built bridges<ins>.</ins>",
        ),
        ("I cannot help with that.", "I cannot help.", "I cannot help<del>with that</del>."),
        ("a b c", "x y z", "x y z"),
        ("", "x", "x"),
        ("x", "", ""),
    ],
)
def test_known_differences(old, new, marked):
    assert str(marks(old, new)) == marked


def test_a_long_answer_is_cut_and_says_so():
    text = str(marks("", "x" * (LONGEST + 1234)))
    assert text.endswith("… (1,234 more characters)")
    assert len(text) < LONGEST + 60


def test_prompts_are_picked_by_place_over_all_tasks():
    prompts = {index: ("", f"task {index % 4}") for index in range(100)}
    picked = _evenly(prompts)
    assert len(picked) == SHOWN
    assert sorted(index % 4 for index in picked) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert max(picked) > 40, "not only the first of each task"
    assert len(_evenly({3: ("", "")})) == 1
    assert _evenly({}) == []
