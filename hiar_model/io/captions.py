"""Text in pictures, with the font inside Pillow or one of the system's; videos side by side with captions."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
"""uint8 [H, W, 3], RGB."""
PAPER, INK, GREY = (18, 18, 18), (240, 240, 240), (165, 165, 165)
MISSING = "?"  # is drawn for a letter that no font has
SYSTEM_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "DroidSansFallback.ttf",
    "Arial Unicode.ttf", "PingFang.ttc", "arial.ttf", "msyh.ttc", "segoeui.ttf",
)  # fmt: skip
"""Of Linux, macOS and Windows, with more letters than Pillow's own; Pillow knows the folders."""


@functools.lru_cache(maxsize=32)
def font(pixels: int) -> Any:
    """Pillow's own font in that size: a ``PIL.ImageFont.FreeTypeFont``, Latin letters only."""
    from PIL import ImageFont

    return ImageFont.load_default(size=pixels)


def lacking(text: str, face: Any) -> str:
    """The letters of a text that a font does not have, each once."""
    box = face.getmask("\U0010fffe")

    def drawn(letter: str) -> bool:
        mask = face.getmask(letter)
        return mask.size != box.size or bytes(mask) != bytes(box)

    plain = (c for c in dict.fromkeys(text) if not c.isspace() and unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    return "".join(c for c in plain if not drawn(c))


@functools.lru_cache(maxsize=64)
def typeset(text: str, pixels: int) -> tuple[str, Any, str]:
    """The text, the font of that size to draw it with, and the letters that no font has: they became "?".

    >>> typeset("night", 12)[0]
    'night'
    """
    from PIL import ImageFont

    best, least = font(pixels), lacking(text, font(pixels))
    for name in SYSTEM_FONTS if least else ():
        try:
            face = ImageFont.truetype(name, pixels)
        except OSError:  # not on this machine
            continue
        if len(left := lacking(text, face)) < len(least):
            best, least = face, left
        if not least:
            break
    return "".join(MISSING if c in least else c for c in text), best, least


def shortened(text: str, pixels: int, width: float) -> str:
    """The text in one line, cut off with "..." where it is wider than ``width`` pixels in a font of ``pixels``."""
    text, face, _ = typeset(" ".join(text.split()), pixels)
    if face.getlength(text) <= width:
        return text
    return next(
        (cut for n in range(len(text) - 1, 0, -1) if face.getlength(cut := text[:n].rstrip() + "...") <= width), "..."
    )


class CaptionedGrid:
    """Videos side by side, in rows: a title, lines of text above each, and one line below all that changes.

    Args:
        title: above all. captions: for each video its lines, the first one brighter. size: (height, width) of each.

    Attributes:
        missing: letters of the title that no font here has.

    >>> grid = CaptionedGrid("night", [("left",), ("right",)], (64, 96))
    >>> grid.compose([np.zeros((64, 96, 3), np.uint8)] * 2, "frame 1 of 1").shape[1] > 2 * 96
    True
    """

    def __init__(self, title: str, captions: Sequence[Sequence[str]], size: tuple[int, int]) -> None:
        from PIL import Image, ImageDraw

        height, width = self.size = size
        self.text = max(11, min(28, width // 22))  # pixels
        self.missing = typeset(title, self.text)[2]
        line, gap = round(1.5 * self.text), max(6, self.text // 2)
        count = len(captions)
        columns = count if count <= 3 else -(-count // -(-count // 4))  # rows of 4 at most, equally full
        rows = -(-count // columns)
        above = line * max(map(len, captions)) + gap // 2
        self.corners = [
            (line + 2 * gap + (i // columns) * (above + height + gap) + above, gap + (i % columns) * (width + gap))
            for i in range(count)
        ]
        self.foot = line + 2 * gap + rows * (above + height + gap) + line // 2
        full = (gap + columns * (width + gap), self.foot + line // 2 + gap)
        canvas = Image.new("RGB", full, PAPER)
        pen = ImageDraw.Draw(canvas)

        def write(x: float, y: float, words: str, colour: tuple[int, int, int], room: float) -> None:
            face = typeset(words, self.text)[1]
            pen.text((x, y), shortened(words, self.text, room), fill=colour, font=face, anchor="lm")

        write(gap, gap + line / 2, title, INK, full[0] - 2 * gap)
        for (top, left), lines in zip(self.corners, captions, strict=True):
            for i, words in enumerate(lines):
                write(left, top - above + line * (i + 0.5), words, GREY if i else INK, width)
        self.canvas, self.gap, self.line = canvas, gap, line

    def compose(self, images: Sequence[Picture], footer: str) -> Picture:
        """One frame, uint8 [H, W, 3], of one image uint8 [height, width, 3] of every video."""
        from PIL import ImageDraw

        picture = self.canvas.copy()
        place = (self.gap, self.foot)
        words = shortened(footer, self.text, picture.width - 2 * self.gap)
        ImageDraw.Draw(picture).text(place, words, fill=GREY, font=font(self.text), anchor="lm")
        frame = np.array(picture)
        height, width = self.size
        for image, (top, left) in zip(images, self.corners, strict=True):
            frame[top : top + height, left : left + width] = image
        return frame
