"""Whole numbers and choices, checked alike everywhere; imports no torch, so that a mistake is told at once."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

ORDERS = ("step_first", "stream", "wavefront", "block_first")
CACHE_SOURCES = ("own", "next_step")
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
CACHE_DTYPE_NAMES = (*DTYPE_NAMES, "float8_e4m3fn")
OFFLOAD = ("text", "vae")
ON_NAN = ("stop", "retry")
ON_NEW_TEXT = ("keep", "recache")
MOST_STEPS = 1000
"""Of denoising: the network knows so many noise levels."""
MOST_THREADS = max(64, os.cpu_count() or 1)
"""Of a process, and processes that one command starts: far more, and the system ends them all without a word."""
SLOWEST, FASTEST = 0.01, 1000.0
"""Frames per second that every format can say; beyond them a file shows another rate, or nothing."""
EXECUTORS = ("eager", "graph", "recorded", "pipeline", "pipeline-graph", "pipeline-recorded")


def as_whole(value: object) -> int | None:
    """A whole number of any kind (Python's, numpy's, a tensor of one) as an int; None: it is none, truth values too."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # of a tensor with many numbers
        return None


def whole(name: str, value: Any, least: int | None = None, why: str = "", most: int | None = None) -> int:
    """The value as an int.

    Raises:
        ValueError: it is no whole number, below ``least`` or above ``most``.
    """
    number = as_whole(value)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        legal = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} must be a whole number{legal}{why}, got {value!r}")
    return number


def plain(value: Any) -> Any:
    """numpy's numbers and tensors of one as Python's, which JSON takes; whatever else as it is."""
    return value.item() if hasattr(value, "item") else value


def number_above_0(name: str, value: Any) -> float:
    """The value as a float; ValueError unless it is a finite number above 0, of whatever kind."""
    number = _number(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return number


def number_within(name: str, value: Any, least: float, most: float) -> float:
    """The value as a float; ValueError unless it is a number from ``least`` to ``most``, of whatever kind."""
    number = _number(value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}")
    return number


def _number(value: Any) -> float:
    """Not a number: NaN."""
    try:
        return math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def path_like(name: str, value: Any) -> Path:
    """The value as a path; ValueError for what names no file, such as a number, bytes or an empty string."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{name} must be the path of a file or folder, got {value!r}")
    return Path(value)


def one_of(name: str, value: object, legal: Iterable[str]) -> None:
    """ValueError unless the value is one of the legal ones; names the nearest."""
    legal = tuple(legal)
    if value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(legal)}, got {value!r}{nearest(str(value), legal)}")


def nearest(word: str, legal: Iterable[str]) -> str:
    """ "; did you mean ...?" where a legal word is near, else nothing."""
    near = get_close_matches(word, list(legal), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""
