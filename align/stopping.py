"""SIGTERM and Ctrl-C: a run stops in good order, says how to go on, and never exits with 0."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from align.errors import AlignError, Problem


class Stopped(AlignError):
    """Stopped by a signal, and the same command goes on. Exit code 128 + signal."""

    def __init__(self, signum: int, hint: str = "the same command goes on") -> None:
        self.exit_code = 128 + signum
        super().__init__(Problem(f"stopped by {signal.Signals(signum).name}", hint=hint))


class _Signalled(KeyboardInterrupt):
    """SIGTERM as it travels through a stage; no library swallows a KeyboardInterrupt."""

    signum = signal.SIGTERM


def _on_sigterm(_: int, __: Any) -> NoReturn:
    raise _Signalled


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and Ctrl-C inside become `Stopped` outside, so that locks and files are in order."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if in_main_thread:
            signal.signal(signal.SIGTERM, _on_sigterm)
        yield
    except KeyboardInterrupt as error:
        raise Stopped(getattr(error, "signum", signal.SIGINT)) from None
    finally:
        if in_main_thread:
            for number, handler in kept.items():
                signal.signal(number, handler)
