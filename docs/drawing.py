"""Drawings and charts as SVG, for the pictures of the pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from statistics import mean

BLUE, ORANGE, GREEN, GREY, INK = "#185fa5", "#c16212", "#2e7d4f", "#8a8a8a", "#1b1b1b"
PALE = {BLUE: "#d5e5f4", ORANGE: "#f7dfc6", GREEN: "#d6ebdd", GREY: "#ececec"}
COLOURS = (BLUE, ORANGE, GREEN, GREY)


class Picture:
    """An SVG that grows with what is drawn on it."""

    def __init__(self, width: float) -> None:
        self.width, self.height, self.body = width, 0.0, ""

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "", dash: bool = False, r: float = 3
    ) -> None:
        edge = f' stroke="{stroke}" stroke-width="1.6"' if stroke else ""
        edge += ' stroke-dasharray="4 3"' if dash else ""
        self.body += f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r:g}" fill="{fill}"{edge}/>\n'
        self.height = max(self.height, y + h)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str = "start",
        fill: str = INK,
        size: float = 13,
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.body += (
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-size="{size:g}"{weight}>'
            f"{escape(text)}</text>\n"
        )
        self.height = max(self.height, y + 4)

    def line(
        self, points: Sequence[tuple[float, float]], stroke: str, width: float = 2, dash: str = "", arrow: bool = False
    ) -> None:
        path = "M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in points)
        extra = (f' stroke-dasharray="{dash}"' if dash else "") + (' marker-end="url(#arrow)"' if arrow else "")
        self.body += f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{width:g}"{extra}/>\n'
        self.height = max([self.height, *(y for _, y in points)])

    def area(self, points: Sequence[tuple[float, float]], fill: str) -> None:
        self.body += f'<path d="M{"L".join(f"{x:.4g} {y:.4g}" for x, y in points)}Z" fill="{fill}" opacity="0.18"/>\n'

    def dot(self, x: float, y: float, fill: str, radius: float = 4) -> None:
        self.body += f'<circle cx="{x:.4g}" cy="{y:.4g}" r="{radius:g}" fill="{fill}" fill-opacity="0.8"/>\n'

    def svg(self) -> str:
        w, h = self.width, self.height + 10
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:g} {h:g}" width="{w:g}" height="{h:g}" '
            f'font-family="Helvetica, Arial, sans-serif">\n<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4"'
            f' markerWidth="6" markerHeight="6" orient="auto"><path d="M0 0L8 4L0 8Z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{w:g}" height="{h:g}" fill="#fff"/>\n{self.body}</svg>\n'
        )


# Charts


def lines(title: str, x_title: str, series: Iterable[tuple[str, str, Sequence[Sequence[float]]]]) -> str:
    """Means of several runs over the eighths of a video, in percent, with the range of the runs.

    Args:
        series: (name, colour, values of each run).
    """
    left, top, w, h = 44, 40, 380, 200
    picture = Picture(left + w + 12)
    picture.text(8, 20, title, bold=True)
    for percent in range(0, 101, 20):
        y = top + h * (1 - percent / 100)
        picture.line([(left, y), (left + w, y)], "#e4e4e4", 1)
        picture.text(left - 6, y + 4, str(percent), "end", "#555", 11)
    written: list[float] = []  # heights of names
    for name, colour, runs in series:
        points = [(left + w * (i + 0.5) / len(runs[0]), sum(values) / len(runs)) for i, values in enumerate(zip(*runs))]

        def y_of(percent: float) -> float:
            return top + h * (1 - percent / 100)

        high = [(x, y_of(max(values))) for (x, _), values in zip(points, zip(*runs))]
        low = [(x, y_of(min(values))) for (x, _), values in zip(points, zip(*runs))]
        picture.area([*high, *reversed(low)], colour)
        picture.line([(x, y_of(value)) for x, value in points], colour, 2.4)
        for x, value in points:
            picture.dot(x, y_of(value), colour, 3)
        x, value = points[-1]
        places = [y_of(value) + distance for distance in (22 if value > 50 else 30, -10, 38, 54)]
        written.append(next(y for y in places if all(abs(y - other) >= 14 for other in written)))
        picture.text(x + 8, written[-1], f"{name}: {value:.0f}", "end", colour, 12, True)
    for i in range(len(points)):
        picture.text(left + w * (i + 0.5) / len(points), top + h + 16, str(i + 1), "middle", "#555", 11)
    picture.text(left + w / 2, top + h + 34, x_title, "middle", "#555", 12)
    return picture.svg()


def dots(title: str, panels: Sequence[tuple[str, Sequence[tuple[str, str, Sequence[float]]], int]]) -> str:
    """Rows of dots, one for each training run, and a bar at their mean.

    Args:
        panels: (what the dots measure, rows of (name, colour, values), digits after the point).
    """
    picture, y, left, w = Picture(470), 20.0, 178, 230
    picture.text(8, y, title, bold=True)
    for about, rows, digits in panels:
        values = [value for _, _, each in rows for value in each]
        margin = 0.08 * (max(values) - min(values))
        low, high = min(values) - margin, max(values) + margin
        y += 24
        picture.text(8, y, about, fill="#555", size=12)
        y += 10

        def x_of(value: float, low: float = low, high: float = high) -> float:
            return left + w * (value - low) / (high - low)

        for name, colour, each in rows:
            picture.line([(left, y + 9), (left + w, y + 9)], "#e8e8e8", 1)
            picture.text(left - 8, y + 13, name, "end", size=12)
            for value in each:
                picture.dot(x_of(value), y + 9, colour)
            middle = mean(each)
            picture.line([(x_of(middle), y + 2), (x_of(middle), y + 16)], INK, 2)
            picture.text(left + w + 52, y + 13, f"{middle:.{digits}f}", "end", size=12)
            y += 20
        for value, anchor in ((min(values), "middle"), (max(values), "middle")):
            picture.text(x_of(value), y + 10, f"{value:.{digits}f}", anchor, "#777", 10)
        y += 8
    return picture.svg()


def bars(
    title: str, rows: Sequence[tuple[str, Sequence[tuple[float, str]], str]], legend: Sequence[tuple[str, str]] = (),
    limit: tuple[float, str] | None = None, left: int = 170,
) -> str:  # fmt: skip
    """Horizontal bars, each of several parts.

    Args:
        rows: (name, parts as (value, colour), what is written behind the bar).
        legend: (colour, name). limit: where a dashed line stands, and what it says.
    """
    picture, w, y, x = Picture(470), 470 - left - 66, 44.0, 8.0
    picture.text(8, 20, title, bold=True)
    for colour, name in legend:
        picture.box(x, 30, 12, 12, colour, r=2)
        picture.text(x + 16, 41, name, size=12)
        x += 30 + 6.6 * len(name)
    most = max([sum(value for value, _ in parts) for _, parts, _ in rows] + ([limit[0]] if limit else []))
    y += 12 if legend or limit else -10
    top = y
    for name, parts, label in rows:
        picture.text(left - 8, y + 15, name, "end", size=12)
        at = float(left)
        for value, colour in parts:
            picture.box(at, y, max(0.0, w * value / most), 20, colour, r=0)
            at += w * value / most
        inside = limit is not None
        picture.text(
            at - 6 if inside else at + 6, y + 15, label, "end" if inside else "start", "#fff" if inside else INK, 12
        )
        y += 27
    if limit:
        x = left + w * limit[0] / most
        picture.line([(x, top - 4), (x, y - 4)], INK, 1.2, "4 3")
        picture.text(x, top - 8, limit[1], "end", "#555", 12)
    return picture.svg()
