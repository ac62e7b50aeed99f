"""Signals that end a command as Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Termination, and a closed terminal."""


def listens(number: int) -> bool:
    """Whether a signal is not ignored by the parent process, such as nohup."""
    return signal.getsignal(number) not in (signal.SIG_IGN, None)


@contextmanager
def as_interrupts() -> Iterator[None]:
    """Context in which those signals raise KeyboardInterrupt. Main thread only."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in ENDING if listens(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
