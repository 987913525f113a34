"""The processes of one run: the main one decides, and they wait for each other."""

from collections.abc import Callable
from typing import Any, TypeVar

from align.environment import is_main, world_size
from align.errors import AlignError
from align.launch import join_state

Result = TypeVar("Result")


def wait_for_all() -> None:
    """Come back when every process of the launch is here."""
    if world_size() > 1:
        join_state().wait_for_everyone()


def on_main(decide: Callable[[], Result]) -> tuple[Result | None, bool]:
    """Run `decide` in the main process; every process learns whether there is something to do.

    Its AlignErrors are raised in all processes, so that none waits for one that gave up.
    """
    result: Result | None = None
    verdict: list[Any] = [None, False, 0]
    if is_main():
        try:
            result = decide()
            verdict = [None, result is not None, 0]
        except AlignError as error:
            verdict = [error.problems, False, error.exit_code]
    if world_size() > 1:
        from accelerate.utils import broadcast_object_list

        join_state()
        broadcast_object_list(verdict, from_process=0)
    if verdict[0] is not None:
        told = AlignError(*verdict[0])
        told.exit_code = verdict[2]
        raise told
    return result, verdict[1]
