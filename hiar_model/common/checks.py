"""Checks of arguments, shared by all modules; imports no torch, so that errors appear at once."""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
OFFLOAD = ("text", "vae")
MOST_STEPS = 1000
"""Denoising steps: the network knows so many noise levels."""
MOST_FRAMES = 10**9
"""Frames of a video: more is a slip of the hand, and its sizes overflow."""
MOST_SIDE = 2**16
"""Pixels of a side, likewise."""
MOST_BATCH = 2**16
"""Videos at once, samples of a batch, likewise."""
MOST_CLIP = 10**5
"""Latent frames of a clip to train on."""
MOST_UPDATES = 10**8 - 1
"""Of a training run: saved states are named by eight digits."""
MOST_THREADS = max(64, os.cpu_count() or 1)
"""Threads of a process, and processes that one command starts: with far more the system ends them all."""
SLOWEST, FASTEST = 0.01, 1000.0
"""Frames per second that every format can store."""


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # of two letters or more: one is a drive of Windows


def dtype_name(dtype: object) -> str:
    """A torch.dtype, or its name, as it is written in options and results: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def one_line(value: object) -> str:
    """A value as Python writes it, for a message of one line; an array, a picture or a network by its type."""
    shown = repr(value)
    return shown if isinstance(value, str | int) or ("\n" not in shown and len(shown) <= 60) else type(value).__name__


def as_whole(value: object) -> int | None:
    """A whole number (of Python, of numpy, a tensor of one element) as an int; None for anything else, bools too."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None


def whole(name: str, value: Any, least: int | None = None, why: str = "", most: int | None = None) -> int:
    """The value as an int.

    Raises:
        ValueError: it is no whole number, below ``least`` or above ``most``.
    """
    number = as_whole(value)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        if most == MOST_FRAMES and (number is None or number <= most):
            most = None  # not what is wrong here
        legal = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} must be a whole number{legal}{why}, got {one_line(value)}")
    return number


def plain(value: Any) -> Any:
    """numpy numbers and tensors of one element as Python numbers, for JSON; anything else unchanged."""
    return value.item() if hasattr(value, "item") else value


def as_number(value: Any) -> float:
    """Any number as a float; NaN for anything else."""
    try:
        return math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def finite_number(name: str, value: Any) -> float:
    """The value as a float; ValueError unless it is a finite number."""
    number = as_number(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {one_line(value)}")
    return number


def number_above_0(name: str, value: Any) -> float:
    """The value as a float; ValueError unless it is a finite number above 0."""
    number = as_number(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name} must be a number above 0, got {one_line(value)}")
    return number


def number_at_least_0(name: str, value: Any) -> float:
    """The value as a float; ValueError unless it is a finite number of at least 0."""
    number = as_number(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be a number of at least 0, got {one_line(value)}")
    return number


def number_within(name: str, value: Any, least: float, most: float) -> float:
    """The value as a float; ValueError unless it is a number from ``least`` to ``most``."""
    number = as_number(value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {one_line(value)}")
    return number


LESS_MEMORY = "a smaller size, window, batch or number of frames needs less"


def out_of_memory(error: BaseException, advice: str = LESS_MEMORY) -> str | None:
    """One line about an error of numpy, torch or CUDA that stands for missing memory; None for any other error."""
    words = str(error)
    if not isinstance(error, MemoryError) and not re.search(r"can't allocate memory|out of memory|bad_alloc", words):
        return None
    size = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)|[Uu]nable to allocate ([\d.]+ ?\w+)", words)
    at_once = "" if size is None else f": {size[1] or size[2]} at once"
    return f"out of memory{at_once}; {advice}"


def not_here(path: str) -> str | None:
    """Why a path names nothing on any disk: it is a URL, or begins with ``~``, which shells replace and files are not
    found by. None for any other.
    """
    if _URL.match(path) and not os.path.exists(path):
        return "a URL, of which nothing is read or written"
    home = os.path.expanduser(path)
    if home != path and ("/" in path or path == "~") and not os.path.lexists(path.partition("/")[0]):
        return f"only a shell replaces ~, give {home}"
    return None


def path_like(name: str, value: Any, what: str = "file or folder") -> Path:
    """The value as a path; ValueError for what names no file: a number, bytes, an empty string, :func:`not_here`."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    reason = not_here(text) if isinstance(text, str) else None
    if not isinstance(text, str) or not text or reason:
        got = f"{text}: {reason}" if reason else one_line(value)
        raise ValueError(f"{name} must be the path of a {what}, got {got}")
    return Path(value)


def true_or_false(name: str, value: Any) -> bool:
    """The value (of Python, of numpy, a tensor without axes) as a bool; ValueError for anything else."""
    is_scalar = getattr(value, "shape", None) == () and str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    if not isinstance(value, bool) and not is_scalar:
        raise ValueError(f"{name} must be True or False, got {one_line(value)}")
    return bool(value)


def one_of(name: str, value: object, legal: Iterable[str]) -> None:
    """ValueError unless the value is a legal one; suggests the nearest."""
    legal = tuple(legal)
    if not isinstance(value, str) or value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(legal)}, got {one_line(value)}{nearest(str(value), legal)}")


def nearest(word: str, legal: Iterable[str]) -> str:
    """The text "; did you mean ...?" if a legal word is near, else an empty one. The dashes of options do not count."""
    by_name = {name.lstrip("-"): name for name in legal}
    near = get_close_matches(word.lstrip("-"), by_name, 1, 0.6)
    return f"; did you mean {by_name[near[0]]}?" if near else ""
