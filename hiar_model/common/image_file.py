"""How an image and its place in the video are named, in Python and on the command line; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .checks import MOST_FRAMES, whole
from .file_option import listed, split_option


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
        name, frame = split_option("image", value, "@", _frame, "the frame must be a whole number from 0")
        return cls(name, 0 if frame is None else whole("image frame", frame, 0, most=MOST_FRAMES))

    def __str__(self) -> str:
        return f"{self.path}@{self.frame}" if self.frame or "@" in self.path else self.path


def _frame(text: str) -> int:
    if not text.isdecimal():
        raise ValueError
    return int(text)


ImageLike = str | os.PathLike[str] | tuple[str | os.PathLike[str], int] | ImageFile
"""An image: its path, which stands at frame 0, "path@frame", or (path, frame)."""


def image_files(values: ImageLike | Iterable[ImageLike] | None) -> tuple[ImageFile, ...]:
    """One or several :data:`ImageLike` by rising frame; None: none.

    Raises:
        ValueError: two images at one frame; a frame that is no whole number from 0.
    """
    files = sorted((ImageFile.of(value) for value in listed("image", values, ImageFile)), key=lambda file: file.frame)
    for one, other in pairwise(files):
        if one.frame == other.frame:
            raise ValueError(f"image {one.path} and {other.path} both stand at frame {one.frame}: give @FRAME")
    return tuple(files)
