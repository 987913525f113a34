"""Text and numbers as the page shows them."""

import math
from collections.abc import Mapping
from typing import Any

from align.report.terminal import sanitise

MINUS = "−"


def clean(text: str) -> str:
    """Text from models, data and files without access tokens, its controls and bidi marks made visible."""
    return sanitise(text)


def cut(text: str, most: int) -> str:
    """Text that is no longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def number(value: float | None, digits: int = 3) -> str:
    """`0.612`, `1,234`, `1.2e-05`: as many digits as matter, with a typographic minus."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if value == int(value) and size < 1e15:
        text = f"{int(value):,}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    elif size < 1e-3:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{digits}g}"
    return text.replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """`+0.232` or `−0.041`."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def percent(value: float) -> str:
    """`95 %`, with one digit where a whole number would say 0 or 100 wrongly."""
    exact = 100 * value
    rounded = round(exact)
    plain = rounded not in (0, 100) or abs(exact - rounded) < 0.05
    return f"{exact:.0f}\u00a0%" if plain else f"{exact:.1f}\u00a0%"


def points(value: float) -> str:
    """`12 points` of a hundred."""
    return f"{100 * value:.0f} points"


def interval(found: Mapping[str, Any] | None) -> str:
    """`0.612 [0.592, 0.631]`, or nothing."""
    if not found:
        return ""
    mean = found.get("mean", found.get("value"))
    if mean is None:
        return ""
    low, high = found.get("low"), found.get("high")
    shown = f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    return shown.replace("-", MINUS)


def temperature(at: float) -> str:
    """`greedy` or `at T = 1`."""
    return f"at T = {at:g}" if at else "greedy"


def p_value(change: Mapping[str, Any]) -> str:
    """`p < .001` or `p = .042`."""
    return "p < .001" if change["p"] < 0.001 else f"p = {change['p']:.3f}".replace("0.", ".", 1)
