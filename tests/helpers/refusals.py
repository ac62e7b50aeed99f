"""What bad input is refused with: always one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refused(
    match: str | None = None, error: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """pytest.raises for an error of one line."""
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value), str(caught.value)


def refusal(call: Callable[..., object], *args: object, **options: object) -> str:
    """The line with which a call is refused."""
    with refused() as caught:
        call(*args, **options)
    return str(caught.value)
