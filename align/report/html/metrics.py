"""metrics.jsonl as series: the last word on every step, numbers that are none kept apart."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_POINTS = 240
"""Points of a curve that a chart of this size can show."""

Point = tuple[float, float]


@dataclass
class Metrics:
    """The lines of a run, by step."""

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> figures; of a step that a resumed run did again, the later ones."""
    plain: list[Mapping[str, Any]] = field(default_factory=list)
    """Lines without a step (parts of a sampling, rows of an evaluation)."""
    alarms: list[Mapping[str, Any]] = field(default_factory=list)
    """What PPO said was wrong: alarm, reason, remedy, rollout."""
    broken: dict[str, int] = field(default_factory=dict)
    """Figure -> first step at which it was no finite number."""
    torn: int = 0
    """Lines that are no JSON."""

    def series(self, key: str) -> list[Point]:
        """Steps and values of a figure; values that are no finite number are left out."""
        return [
            (float(step), line[key])
            for step, line in self.steps.items()
            if key in line and math.isfinite(line[key])
        ]


def read_metrics(file: Path) -> Metrics:
    """Read a metrics file; a missing one is empty."""
    found = Metrics()
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    last = -1
    for line in text.split("\n"):  # not splitlines: a value may hold a line separator
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            found.torn += 1
        elif "alarm" in content:
            found.alarms.append(content)
        elif isinstance(content.get("step"), int):
            step = content["step"]
            if step < last:  # a resumed run goes back to its checkpoint
                for later in [known for known in found.steps if known > step]:
                    del found.steps[later]
            last = step
            _take(found, step, content)
        else:
            found.plain.append(content)
    return found


def _take(found: Metrics, step: int, content: Mapping[str, Any]) -> None:
    figures = found.steps.setdefault(step, {})
    for key, value in content.items():
        if key in ("step", "attempt", "stage") or isinstance(value, bool):
            continue
        number = _number(value)
        if number is None:
            continue
        if not math.isfinite(number):
            found.broken.setdefault(key, step)
        figures[key] = number


def _number(value: Any) -> float | None:
    """A figure; `nan` and `inf` are written as words, because JSON has none."""
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None


def thinned(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """As many points as a chart can show: means over runs of neighbours, the last one as it is."""
    if len(points) <= most:
        return points
    size = -(-len(points) // most)
    found = []
    for first in range(0, len(points), size):
        part = points[first : first + size]
        found.append((part[-1][0], sum(value for _, value in part) / len(part)))
    found[-1] = points[-1]
    return found
