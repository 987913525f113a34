"""Judges that compare an answer with the one in its row, and the call that guards any judge.

A judge is `judge(row, completion) -> {"score": ..., further parts}`; a run reports the mean of
every part. The true answer is the row's `answer`, `label`, `gold` or `completion`.
"""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

import regex as timed  # type: ignore[import-untyped]

from align.errors import AlignError, Problem, fail
from align.registry import Judge

ANSWER_COLUMNS = ("answer", "label", "gold", "completion", "output")

_SIGN = r"([-+\u2212]?)"
_DIGITS = r"(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(rf"(?<![\w.]){_SIGN}[$\u20ac\u00a3]?{_SIGN}{_DIGITS}")
_MARKED = re.compile(r"####(.*)")

PATTERN_LIMIT = 1_000
"""Longest pattern in characters."""
TEXT_LIMIT = 20_000
"""A pattern is searched in so many characters of an answer."""
SECONDS_LIMIT = 1.0
"""A pattern that searches longer counts as not found."""


def number(row: Mapping[str, Any], completion: str) -> dict[str, float]:
    """Whether the last number of the answer is the true one.

    A number behind `####` (GSM8K) goes before the last one. Signs, thousands commas, decimals and
    currency signs are read, and 2.50 equals 2.5. `answered` says whether there is a number at all.
    """
    wanted = final_number(str(_truth(row)))
    if wanted is None:
        fail(f"the true answer {str(_truth(row))[:80]!r} holds no number")
    found = final_number(completion)
    return {"score": float(found == wanted), "answered": float(found is not None)}


def final_number(text: str) -> Decimal | None:
    """The number behind the last `####` that has one, else the last number; None without any."""
    for part in [*reversed(_MARKED.findall(text)), text]:
        found = _NUMBER.findall(part)
        if found:
            sign, inner_sign, digits = found[-1]
            value = Decimal(digits.replace(",", ""))
            return -value if {sign, inner_sign} & {"-", "\u2212"} else value
    return None


def exact(row: Mapping[str, Any], completion: str) -> dict[str, float]:
    """Whether the answer is the true one, letter for letter but for white space."""
    return {"score": float(_spaced(completion) == _spaced(str(_truth(row))))}


def contains(row: Mapping[str, Any], completion: str) -> dict[str, float]:
    """Whether the true answer stands in the answer, as whole words and in any case."""
    wanted = _spaced(str(_truth(row))).casefold()
    if not wanted:
        fail("the true answer is empty, and every text contains that")
    found = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", _spaced(completion).casefold())
    return {"score": float(found is not None)}


def pattern(row: Mapping[str, Any], completion: str) -> dict[str, float]:
    """Whether the regular expression in the row's `pattern` column is found in the answer.

    A search that takes longer than a second is given up: `timeout` is 1 then and the score 0.
    """
    compiled = _compiled(_column(row, ("pattern",), "a regular expression"))
    try:
        found = compiled.search(completion[:TEXT_LIMIT], timeout=SECONDS_LIMIT)
    except TimeoutError:
        return {"score": 0.0, "timeout": 1.0}
    return {"score": float(found is not None), "timeout": 0.0}


@lru_cache(maxsize=4096)
def _compiled(expression: str) -> Any:
    if len(expression) > PATTERN_LIMIT:
        fail(f"`pattern` has {len(expression)} characters, more than {PATTERN_LIMIT}")
    try:
        return timed.compile(expression)
    except timed.error as error:
        fail(f"`pattern` is no regular expression: {error}")


def _truth(row: Mapping[str, Any]) -> Any:
    """The true answer; messages (an assistant's turn) count by the content of the last one."""
    value = _column(row, ANSWER_COLUMNS, "the true answer")
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        return value[-1].get("content", "")
    return value


def _column(row: Mapping[str, Any], names: tuple[str, ...], what: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    fail(
        f"the row has no column with {what} ({' or '.join(names)}); it has {', '.join(row)}",
        hint=f"map it with data.columns, e.g. `{names[0]}: <your column>`",
    )


def _spaced(text: str) -> str:
    return " ".join(text.split())


def ask(
    judge: Judge, name: str, row: Mapping[str, Any], completion: str, where: str
) -> dict[str, float]:
    """One verdict, checked: whatever a judge does wrong becomes an error that names the row.

    Args:
        judge: the function.
        name: what the recipe calls it.
        row: the prompt's row, with all its columns.
        completion: the answer's text.
        where: the row in words, for the error.

    Returns:
        Part -> finite number, with `score` among them.
    """
    try:
        verdict = judge(row, completion)
    except AlignError as error:
        raise AlignError(
            *(
                Problem(f"the judge `{name}`: {problem.message}", where, problem.hint)
                for problem in error.problems
            )
        ) from error
    except Exception as error:
        fail(
            f"the judge `{name}` failed: {type(error).__name__}: {error}",
            where=where,
            hint="mend the judge or the row; the same command goes on",
        )
    if not isinstance(verdict, Mapping) or "score" not in verdict:
        fail(f"the judge `{name}` gave {verdict!r:.80}, not a mapping with `score`", where=where)
    return {str(part): _checked(part, value, name, where) for part, value in verdict.items()}


def _checked(part: Any, value: Any, name: str, where: str) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        fail(f"the judge `{name}` gave {value!r:.80} as `{part}`, not a number", where=where)
    plain = float(value)
    if not math.isfinite(plain):
        fail(f"the judge `{name}` gave {plain} as `{part}`, not a finite number", where=where)
    return plain
