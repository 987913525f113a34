"""Scales, ticks and elements."""

import math

from hypothesis import given
from hypothesis import strategies as some
from report_pages import Page

from align.report.html.svg import Frame, Scale, tag, ticks, wide

NUMBERS = some.floats(-1e12, 1e12).filter(lambda value: value == 0 or abs(value) > 1e-9)


@given(some.lists(NUMBERS, min_size=1, max_size=9), some.integers(2, 6))
def test_a_round_range_holds_the_values_and_its_ends_are_ticks(values, count):
    low, high = wide(values, count)
    slack = 1e-9 * max(abs(low), abs(high))
    assert low - slack <= min(values)
    assert max(values) <= high + slack
    found = ticks(low, high, count)
    assert 2 <= len(found) <= count + 2
    assert found == sorted(found)
    if min(values) != max(values) and (high - low) > 1e-6 * max(abs(low), abs(high)):
        step = found[1] - found[0]
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - known) for known in (1, 2, 2.5, 5, 10)) < 1e-3


def test_known_ticks():
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert wide([0.26, 1.0]) == (0.2, 1.0)
    assert wide([0.0, 158.0]) == (0.0, 200.0)
    assert wide([3.0]) == (2.6, 3.4)


def test_scales():
    assert Scale(0, 10, 0, 100)(5) == 50
    assert Scale(0, 4, 0, 100, root=True)(1) == 50
    assert Scale(1, 1, 0, 100)(1) == 50


@given(some.text())
def test_any_text_stays_inside_its_element(text):
    page = Page(str(tag("text", text, class_=text, x=1.5)))
    assert [name for name, _ in page.tags] == ["text"]
    assert set(page.tags[0][1]) == {"class", "x"}
    assert page.unbalanced == []
    assert page.open == []


def test_a_frame_places_points_and_names_its_axes():
    frame = Frame.around([0, 10], [0, 1], "step", "loss")
    assert frame.at((0, 0)) == (50, 174)
    assert frame.at((10, 1)) == (328, 24)
    page = Page(str(frame.draw("what <it> is")))
    assert page.tags[0][1]["aria-label"] == "what <it> is"
    assert {"step", "loss", "0.25"} <= set(page.within("text"))
