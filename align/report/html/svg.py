"""SVG by hand: elements with escaped text, scales with round ticks, and the frame of a chart.

No style attribute is ever written: the page's policy allows its one style sheet only, so colours
are classes and geometry is attributes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from align.report.html.text import clean, number

Point = tuple[float, float]


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element: `class_` is `class`, underscores become hyphens, None is left out, text is escaped."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            label = key.rstrip("_").replace("_", "-")
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            parts.append(f'{label}="{escape(clean(str(shown)))}"')
    inner = Markup("").join(
        child if isinstance(child, Markup) else escape(clean(str(child))) for child in children
    )
    return Markup(f"<{' '.join(parts)}>{inner}</{name}>")


def image(width: float, height: float, title: str, *children: object, kind: str = "") -> Markup:
    """A drawing that scales with its column; screen readers read the title."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        class_=f"chart {kind}".strip(),
        role="img",
        aria_label=title,
        width=f"{width:g}",
        height=f"{height:g}",
    )


def path(points: Iterable[Point], kind: str, *, close: bool = False) -> Markup:
    """A line through points."""
    text = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return tag("path", d=f"M{text}{'Z' if close else ''}", class_=kind)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def label(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> Markup:
    """Text at a place."""
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=kind or None)


def dot(x: float, y: float, kind: str, title: str, radius: float = 4.0) -> Markup:
    """A point that says what it is when one points at it."""
    return tag("circle", tag("title", title), cx=x, cy=y, r=radius, class_=kind)


def _step(low: float, high: float, count: int) -> float:
    """The round number (1, 2, 2.5, 5 times a power of ten) that divides a range into `count` or fewer."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside a range, about `count` of them."""
    if not high > low:
        return [low]
    step = _step(low, high, count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def wide(values: Sequence[float], count: int = 4) -> tuple[float, float]:
    """The round range that holds all values."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    step = 0.0
    while step != _step(low, high, count):  # a wider range may want a wider step
        step = _step(low, high, count)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return round(low, 12), round(high, 12)


@dataclass(frozen=True)
class Scale:
    """Values to places."""

    low: float
    high: float
    first: float
    last: float
    root: bool = False
    """Square root of the distance from `low`, as KL is drawn (arXiv 2210.10760)."""

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        share = math.sqrt(max(share, 0.0)) if self.root else share
        return self.first + share * (self.last - self.first)


@dataclass(frozen=True)
class Frame:
    """Axes of a chart, and the grid behind it."""

    x: Scale
    y: Scale
    x_name: str
    y_name: str
    x_ticks: tuple[float, ...] | None = None
    width: float = 340
    height: float = 210

    @classmethod
    def around(
        cls,
        xs: Sequence[float],
        ys: Sequence[float],
        x_name: str,
        y_name: str,
        *,
        x_round: bool = False,
        root: bool = False,
    ) -> "Frame":
        """The frame that holds all values."""
        low, high = wide(xs) if x_round else (min(xs), max(xs))
        bottom, top = wide(ys)
        return cls(
            Scale(low, high if high > low else low + 1, 50, 328, root),
            Scale(bottom, top, 174, 24),
            x_name,
            y_name,
        )

    def grid(self) -> Markup:
        """Lines, numbers and names of the axes."""
        left, right, bottom = self.x.first, self.x.last, self.y.first
        parts = []
        for value in ticks(self.y.low, self.y.high):
            y = self.y(value)
            parts += [
                line(left, y, right, y, "grid"),
                label(left - 6, y + 3.5, number(value), anchor="end"),
            ]
        marks = ticks(self.x.low, self.x.high) if self.x_ticks is None else self.x_ticks
        for value in marks:
            x = self.x(value)
            parts += [
                line(x, bottom, x, bottom + 4, "axis"),
                label(x, bottom + 16, number(value), anchor="middle"),
            ]
        parts.append(line(left, bottom, right, bottom, "axis"))
        parts.append(label(right, bottom + 31, self.x_name, anchor="end", kind="name"))
        parts.append(label(8, 12, self.y_name, kind="name"))
        return Markup("").join(parts)

    def draw(self, title: str, *children: object) -> Markup:
        """The chart: grid first, then what is measured."""
        return image(self.width, self.height, title, self.grid(), *children)

    def at(self, point: Point) -> Point:
        """A point of values as a place."""
        return self.x(point[0]), self.y(point[1])
