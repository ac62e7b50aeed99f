"""Signals that end a command as Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Termination, and a closed terminal."""

AHEAD = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""What schedulers send some time before the end of a job, where they are asked to."""


def listens(number: int) -> bool:
    """Whether a signal is not ignored by the parent process, such as nohup."""
    return signal.getsignal(number) not in (signal.SIG_IGN, None)


@contextmanager
def handled(handler: Callable[[], None], numbers: Sequence[int] = (signal.SIGINT, *ENDING)) -> Iterator[None]:
    """Context in which these signals call ``handler``. Main thread only."""
    before = {number: signal.signal(number, lambda *_: handler()) for number in numbers if listens(number)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def interrupted(error: KeyboardInterrupt) -> str:
    """The line of a command that was ended."""
    return "; ".join(["interrupted", *map(str, error.args)])


def as_interrupts() -> AbstractContextManager[None]:
    """Context in which termination and a closed terminal raise KeyboardInterrupt, as Ctrl-C does by itself."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    return handled(interrupt, ENDING)
