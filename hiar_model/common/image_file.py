"""How an image and its place in the video are named, in Python and on the command line; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

from .checks import MOST_FRAMES, path_like, whole


@dataclass(frozen=True)
class ImageFile:
    """An image and the pixel frame of the video that it stands at; ``str()`` of it is FILE@FRAME, as ``--image`` takes
    it.

    >>> str(ImageFile.of("face.png@24")), ImageFile.of(("face.png", 24)).frame, str(ImageFile.of("face.png"))
    ('face.png@24', 24, 'face.png')
    """

    path: str
    frame: int = 0

    @classmethod
    def of(cls, value: Any) -> ImageFile:
        """From an :data:`ImageLike`; ValueError for a frame that is no whole number from 0."""
        if isinstance(value, ImageFile):
            return value
        path, frame = value if isinstance(value, tuple) and len(value) == 2 else (value, 0)
        path_like("image", path)
        name = os.fspath(path)
        head, at, tail = name.rpartition("@")
        if not isinstance(value, tuple) and at and not os.path.exists(name):  # a file's name may hold an @
            if tail.isdecimal():
                name, frame = head, int(tail)
            elif os.path.exists(head):
                raise ValueError(f"image {name}: the frame must be a whole number from 0, got {tail!r}")
        if not name:
            raise ValueError(f"image {value}: no file before the frame; expected FILE or FILE@FRAME")
        return cls(name, whole("image frame", frame, 0, most=MOST_FRAMES))

    def __str__(self) -> str:
        return f"{self.path}@{self.frame}" if self.frame or "@" in self.path else self.path


ImageLike = str | os.PathLike[str] | tuple[str | os.PathLike[str], int] | ImageFile
"""An image: its path, which stands at frame 0, "path@frame", or (path, frame)."""


def image_files(values: ImageLike | Iterable[ImageLike] | None) -> tuple[ImageFile, ...]:
    """One or several :data:`ImageLike` by rising frame; None: none.

    Raises:
        ValueError: two images at one frame; a frame that is no whole number from 0.
    """
    if values is None:
        return ()
    single = isinstance(values, str | os.PathLike | ImageFile)
    pair = isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], Integral)
    if not (single or pair) and (isinstance(values, bytes | Mapping) or not isinstance(values, Iterable)):
        raise ValueError(f"image must be a file, FILE@FRAME, (file, frame), or a list of these, got {values!r}")
    listed: Iterable[Any] = [values] if single or pair else values  # type: ignore[assignment]
    files = sorted((ImageFile.of(value) for value in listed), key=lambda file: file.frame)
    for one, other in pairwise(files):
        if one.frame == other.frame:
            raise ValueError(f"image {one.path} and {other.path} both stand at frame {one.frame}: give @FRAME")
    return tuple(files)
