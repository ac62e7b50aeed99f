"""Options that name a file and a value behind it, as FILE:SCALE and FILE@FRAME; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .checks import one_line, path_like


def split_option(option: str, value: Any, mark: str, read: Callable[[str], Any], what: str) -> tuple[str, Any]:
    """The path of a file and the value behind it, None if there is none.

    Args:
        option: named in errors. value: a path, "path<mark>value", or (path, value). A file whose own name has the mark
            is found by that name.
        read: the text behind the mark -> value; ValueError for what is none. what: a legal value, for the error.

    Raises:
        ValueError: no path; a file that is there, with something else than a value behind the mark.
    """
    path, number = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    path_like(option, path, "picture" if option == "image" else "file or folder")
    name = os.fspath(path)
    head, separator, tail = name.rpartition(mark)
    if not isinstance(value, tuple) and separator and not os.path.exists(name):
        try:
            name, number = head, read(tail)
        except ValueError:
            if os.path.exists(head):
                raise ValueError(f"{option} {name}: {what}, got {tail!r}") from None
    if not name:
        raise ValueError(f"{option} {value}: no file before the {mark!r}")
    return name, number


def listed(option: str, values: Any, kind: type) -> list[Any]:
    """One or several paths, pairs (path, number) or objects of ``kind``, as a list; None: none.

    Raises:
        ValueError: anything else.
    """
    if values is None:
        return []
    single = isinstance(values, str | os.PathLike | kind)
    if not single and (isinstance(values, bytes | Mapping) or not isinstance(values, Iterable)):
        raise ValueError(f"{option} must be a file, (file, number), or a list of these, got {one_line(values)}")
    pair = (
        isinstance(values, tuple) and len(values) == 2 and not isinstance(values[1], str | os.PathLike | tuple | kind)
    )
    return [values] if single or pair else list(values)
