"""Small charts as PNG: lines and bars, drawn with Pillow, so that the base install can draw.

A chart is data: panels of lines (:class:`Lines`) or bars (:class:`Bars`), arranged in a grid by :func:`draw`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .atomic import atomic
from .captions import Picture, font, shortened, typeset

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
"""Of series in turn: Okabe and Ito's, which stay apart for colour-blind readers."""
PALE = (190, 190, 190)
INK, GREY, GRID = (40, 40, 40), (110, 110, 110), (226, 226, 226)
WIDTH, HEIGHT = 480, 300  # of a panel, in pixels
TEXT, TITLE = 13, 15
OVER = 2  # drawn so much larger, then reduced: smooth lines
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 34, 44  # around the axes of a panel of lines


@dataclass(frozen=True)
class Series:
    """One line: values over positions; a gap where a value is not finite. ``colour``: RGB; None: the next in turn."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Lines:
    """A panel of lines over common axes.

    Attributes:
        y_range: (lowest, highest) that the axis shows at least.
        log_x, log_y: logarithmic axes; values of 0 or less are gaps there.
        points: whether every value has a dot.
    """

    title: str
    series: Sequence[Series]
    x_label: str = ""
    y_label: str = ""
    y_range: tuple[float, float] | None = None
    log_x: bool = False
    log_y: bool = False
    points: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar, and the least value that it could have (0: unknown), drawn as a mark across it."""

    label: str
    value: float
    limit: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """A panel of horizontal bars, longest value at full width. ``unit`` stands behind the values."""

    title: str
    bars: Sequence[Bar]
    unit: str = ""
    limit_label: str = "limit"


@dataclass
class _Axis:
    """Data to pixels along one axis."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.stop - self.start)


def draw(panels: Sequence[Lines | Bars], columns: int = 2) -> Picture:
    """Draw panels in reading order; uint8 [H, W, 3].

    Raises:
        ValueError: no panel, fewer than one column.

    >>> draw([Lines("square", [Series("x^2", [0, 1, 2], [0, 1, 4])])]).shape
    (300, 480, 3)
    """
    from PIL import Image, ImageDraw

    if not panels or columns < 1:
        raise ValueError(f"need at least one panel and one column, got {len(panels)} and {columns}")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    canvas = Image.new("RGB", (OVER * WIDTH * columns, OVER * HEIGHT * rows), "white")
    pen = ImageDraw.Draw(canvas)
    for i, panel in enumerate(panels):
        left, top = WIDTH * (i % columns), HEIGHT * (i // columns)
        if isinstance(panel, Lines):
            _draw_lines(_Pen(canvas, pen, left, top), panel)
        else:
            _draw_bars(_Pen(canvas, pen, left, top), panel)
    return np.asarray(canvas.reduce(OVER))


def save_plot(panels: Sequence[Lines | Bars], path: str | os.PathLike[str], columns: int = 2) -> None:
    """Draw into a .png, atomically. Errors: see :func:`draw`; OSError if it cannot be written."""
    from PIL import Image

    image = Image.fromarray(draw(panels, columns))
    with atomic(path) as partial:
        image.save(partial, "PNG")


@dataclass
class _Pen:
    """Draws in the pixels of one panel."""

    canvas: Image.Image
    pen: ImageDraw.ImageDraw
    left: float
    top: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        return OVER * (self.left + x), OVER * (self.top + y)

    def line(self, points: Sequence[tuple[float, float]], colour: Any, width: float = 1.0) -> None:
        self.pen.line([self.at(*point) for point in points], fill=colour, width=round(OVER * width), joint="curve")

    def dot(self, x: float, y: float, colour: Any, radius: float = 2.5) -> None:
        self.pen.ellipse([self.at(x - radius, y - radius), self.at(x + radius, y + radius)], fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Any) -> None:
        self.pen.rectangle([self.at(x0, y0), self.at(max(x0, x1), y1)], fill=colour)

    def text(self, x: float, y: float, text: str, anchor: str, size: int = TEXT, colour: Any = INK) -> None:
        words, face, _ = typeset(text, OVER * size)
        self.pen.text(self.at(x, y), words, fill=colour, font=face, anchor=anchor)

    def text_up(self, x: float, y: float, text: str) -> None:
        """Reading upwards, its middle at (x, y)."""
        from PIL import Image, ImageDraw

        face = font(OVER * TEXT)
        width, height = math.ceil(face.getlength(text)) + 4, OVER * (TEXT + 6)
        flat = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(flat).text((width / 2, height / 2), text, fill=GREY, font=face, anchor="mm")
        middle = self.at(x, y)
        self.canvas.paste(flat.rotate(90, expand=True), (round(middle[0] - height / 2), round(middle[1] - width / 2)))


def _draw_lines(pen: _Pen, panel: Lines) -> None:
    pen.text(WIDTH / 2, 12, shortened(panel.title, TITLE, WIDTH - 20), "mt", TITLE)
    shown = [
        (x, y)
        for line in panel.series
        for x, y in zip(line.x, line.y, strict=True)
        if _on(x, panel.log_x) and _on(y, panel.log_y)
    ]
    if not shown:
        pen.text(WIDTH / 2, HEIGHT / 2, "nothing to draw", "mm", colour=GREY)
        return
    xs, ys = ([point[i] for point in shown] for i in (0, 1))
    across = _axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, panel.log_x, whole=False)
    low, high = panel.y_range or (min(ys), max(ys))
    turn = iter(COLOURS * len(panel.series))
    colours = [line.colour or next(turn) for line in panel.series]
    names = [(line.label, colour) for line, colour in zip(panel.series, colours, strict=True) if line.label]
    top = _legend(pen, names) if len(names) > 1 else TOP
    up = _axis(min(low, *ys), max(high, *ys), HEIGHT - BOTTOM, top, panel.log_y, whole=True)
    for tick in up.ticks:
        pen.line([(LEFT, up(tick)), (WIDTH - RIGHT, up(tick))], GRID)
        pen.text(LEFT - 7, up(tick), _number(tick), "rm", colour=GREY)
    for tick in across.ticks:
        pen.line([(across(tick), HEIGHT - BOTTOM), (across(tick), HEIGHT - BOTTOM + 4)], GREY)
        pen.text(across(tick), HEIGHT - BOTTOM + 7, _number(tick), "mt", colour=GREY)
    pen.line([(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], GREY)
    pen.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, panel.x_label, "mb", colour=GREY)
    if panel.y_label:
        pen.text_up(12, (top + HEIGHT - BOTTOM) / 2, panel.y_label)
    for i, (line, colour) in enumerate(zip(panel.series, colours, strict=True)):
        width = 2 + 1.5 * (len(colours) - 1 - i) / len(colours)  # of equal lines the lower one still shows
        piece: list[tuple[float, float]] = []
        for x, y in [*zip(line.x, line.y, strict=True), (math.nan, math.nan)]:
            if _on(x, panel.log_x) and _on(y, panel.log_y):
                piece.append((across(x), up(y)))
                continue
            if len(piece) > 1:
                pen.line(piece, colour, width)
            if panel.points or len(piece) == 1:
                for point in piece:
                    pen.dot(*point, colour)
            piece = []


def _legend(pen: _Pen, names: Sequence[tuple[str, Any]]) -> float:
    """The names of the lines with their colours, in rows below the title; returns where the axes may begin."""
    x, y, gap = float(LEFT), float(TOP), 18
    for name, colour in names:
        name = shortened(name, TEXT, WIDTH - LEFT - RIGHT - 26)
        width = 26 + font(TEXT).getlength(name)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, y = float(LEFT), y + 17
        pen.line([(x, y + 4), (x + 18, y + 4)], colour, 2.5)
        pen.text(x + 24, y + 4, name, "lm")
        x += width + gap
    return y + 22


def _draw_bars(pen: _Pen, panel: Bars) -> None:
    pen.text(WIDTH / 2, 12, shortened(panel.title, TITLE, WIDTH - 20), "mt", TITLE)
    widths = [font(TEXT).getlength(bar.label) for bar in panel.bars]
    left, right = max(widths, default=0) + 20, WIDTH - 150
    longest = max((max(bar.value, bar.limit) for bar in panel.bars), default=0.0) or 1.0
    step = min(40.0, (HEIGHT - TOP - 44) / max(1, len(panel.bars)))
    for i, bar in enumerate(panel.bars):
        y, end = TOP + 6 + step * (i + 0.5), left + bar.value / longest * (right - left)
        pen.text(left - 8, y, bar.label, "rm")
        pen.box(left, y - 0.32 * step, end, y + 0.32 * step, COLOURS[1])
        if bar.limit:
            at = left + bar.limit / longest * (right - left)
            pen.line([(at, y - 0.45 * step), (at, y + 0.45 * step)], COLOURS[0], 3)
        said = f"{_number(bar.value)} {panel.unit}".strip() + f"{bar.note and ', '}{bar.note}"
        pen.text(max(end, left + bar.limit / longest * (right - left)) + 8, y, said, "lm", colour=GREY)
    if any(bar.limit for bar in panel.bars):
        pen.line([(left, HEIGHT - 28), (left, HEIGHT - 14)], COLOURS[0], 3)
        said = shortened(panel.limit_label, TEXT, WIDTH - left - 16)
        pen.text(left + 8, HEIGHT - 21, said, "lm", colour=GREY)


def _on(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _axis(low: float, high: float, start: float, stop: float, log: bool, whole: bool) -> _Axis:
    """An axis over the values; ``whole``: from tick to tick."""
    if high <= low:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    ticks = log_ticks(low, high) if log else linear_ticks(low, high, most=6 if whole else 8)
    if whole:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    return _Axis(low, high, start, stop, log, [tick for tick in ticks if low <= tick <= high])


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``, 1, 2 or 5 times a power of ten apart.

    >>> linear_ticks(3, 98)
    [0, 20, 40, 60, 80, 100]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= most)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [round(n * step, places) for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
    return [int(tick) if tick == int(tick) else tick for tick in ticks]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the range; only the powers where it is wide, round numbers where it is
    narrow.

    >>> log_ticks(3, 40), log_ticks(1, 5000)
    ([2, 5, 10, 20, 50], [1, 10, 100, 1000, 10000])
    """
    if high / low < 5 and (ticks := linear_ticks(low, high))[0] > 0:
        return ticks
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
    first = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    last = min((i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9)), default=len(ticks) - 1)
    return [int(tick) if tick == int(tick) else tick for tick in ticks[first : last + 1]]


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}" if abs(value) < 10**6 else f"{value:.3g}"
