"""Errors that are answers: what is wrong, where, and the way out."""

from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Problem:
    """One thing a user has to mend."""

    message: str
    where: str | None = None
    """`file:line`, `file row 3`, a key or a folder."""
    hint: str | None = None
    """The way out, as an imperative."""

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        hint = f"\n    {self.hint}" if self.hint else ""
        return f"{where}{self.message}{hint}"


class AlignError(Exception):
    """A user's mistake or a refusal to go on: shown on one screen, exit code 2, no traceback."""

    exit_code = 2

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class NotPushed(AlignError):
    """A push that did not come about. The run that was to be pushed is complete and stays."""

    @classmethod
    def of(cls, error: AlignError) -> "NotPushed":
        """The same problems with the same exit code."""
        made = cls(*error.problems)
        made.exit_code = error.exit_code
        return made


class HubFailure(NotPushed):
    """The Hub or the way to it failed. Nothing is lost; exit code 1."""

    exit_code = 1
    status: int | None = None
    """The HTTP status, where the Hub gave one."""


def fail(message: str, *, where: str | None = None, hint: str | None = None) -> NoReturn:
    """Raise an AlignError with a single problem."""
    raise AlignError(Problem(message, where, hint))
