"""The first chart of the page: every model's score with its interval, on one axis."""

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from align.report.html.exam import Exam, Row
from align.report.html.svg import tag, ticks, wide
from align.report.html.text import interval, number, p_value, signed, temperature

HEIGHT = 40
"""Of a row; it is 100 wide, with 3 more on each side for the dots at the ends."""


@dataclass(frozen=True)
class Cell:
    """A model at a temperature."""

    value: str
    bounds: str
    change: str
    p: str
    direction: str
    """`up`, `down` or `flat`: on which side of 0 the whole interval of the change lies."""


@dataclass(frozen=True)
class Lane:
    """A row of the chart."""

    label: str
    made_by: str
    colour: str
    image: Markup
    cells: tuple[Cell | None, ...]
    """One per temperature."""
    is_final: bool


@dataclass(frozen=True)
class Race:
    """All models on one axis."""

    heads: tuple[str, ...]
    what: str
    lanes: tuple[Lane, ...]
    axis: tuple[str, ...]
    """Numbers below the axis, evenly spread from its beginning to its end."""
    baseline: str | None


def colours(exam: Exam) -> dict[str, str]:
    """Row of the table -> colour class, the same on the whole page; grey for what no stage made."""
    found: dict[str, str] = {}
    place = 0
    for label in exam.labels:
        if exam.stage.models and exam.made_by(label) is None:
            found[label] = "s6"
        else:
            found[label] = f"s{place % 6}"
            place += 1
    return found


def race(exam: Exam) -> Race | None:
    """The chart, or None where the evaluation has no value to draw."""
    values = [
        v for label in exam.labels for at in exam.temperatures if (v := exam.value(label, at))
    ]
    if not values:
        return None
    bounds = [float(value[side]) for value in values for side in ("low", "high")]
    low, high = wide([min(0.0, *bounds) if exam.part == "score" else min(bounds), *bounds], 5)
    marks = ticks(low, high, 5)
    colour = colours(exam)
    lanes = tuple(_lane(exam, label, colour[label], (low, high), marks) for label in exam.labels)
    heads = tuple(temperature(at).removeprefix("at ") for at in exam.temperatures)
    return Race(heads, exam.part, lanes, tuple(map(number, marks)), exam.baseline)


def _lane(
    exam: Exam, label: str, colour: str, span: tuple[float, float], marks: list[float]
) -> Lane:
    rows = [(at, exam.value(label, at)) for at in exam.temperatures]
    said = ", ".join(f"{interval(value)} {temperature(at)}" for at, value in rows if value)

    def place(value: float) -> float:
        return 100 * (value - span[0]) / (span[1] - span[0])

    grid = [_stroke(place(mark), 0, place(mark), HEIGHT, "grid") for mark in marks]
    shapes = [
        shape
        for at, (_, value) in enumerate(rows)
        if value
        for shape in _mark(value, at, len(rows), colour, place)
    ]
    image = tag(
        "svg",
        tag("title", f"{label}: {said}"),
        *grid,
        *shapes,
        viewBox=f"-3 0 106 {HEIGHT}",
        preserveAspectRatio="none",
        class_="lane",
        role="img",
    )
    made_by = exam.made_by(label) or ""
    same = made_by in (label, label.partition(" best-of-")[0])
    cells = tuple(_cell(exam, label, at) for at in exam.temperatures)
    return Lane(label, "" if same else made_by, colour, image, cells, label == exam.final)


def _mark(value: Row, at: int, count: int, colour: str, place: object) -> Iterator[Markup]:
    """An interval and its mean: filled for the first temperature, hollow for the others."""
    assert callable(place)
    y = HEIGHT * (at + 1) / (count + 1)
    yield _stroke(place(value["low"]), y, place(value["high"]), y, f"reach {colour}")
    x = place(value["mean"])
    yield _stroke(x, y, x, y, f"bead {colour}")
    if at:
        yield _stroke(x, y, x, y, "bead hole")


def _stroke(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    # A path of no length with round ends is a dot that stays round when the drawing is stretched.
    return tag("path", d=f"M{x1:.2f} {y1:.2f}L{x2:.2f} {y2:.2f}", class_=kind)


def _cell(exam: Exam, label: str, at: float) -> Cell | None:
    value = exam.value(label, at)
    if value is None:
        return None
    change = exam.change(label, at)
    mean, _, bounds = interval(value).partition(" ")
    if change is None:
        return Cell(mean, bounds, "", "", "flat")
    direction = "up" if change["low"] > 0 else "down" if change["high"] < 0 else "flat"
    return Cell(mean, bounds, signed(change["mean"]), p_value(change), direction)
