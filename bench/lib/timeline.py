"""Draw timelines as SVG: a lane per rank, a box per task with the number of its block."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hiar_model.schedule.plan import BatchItem
from hiar_model.schedule.simulator import Timeline
from hiar_model.schedule.stages import steps_label

UNIT, BOX, LANE = 26, 20, 25  # pixels: width of a unit of time, height of a box, of a lane
LEFT, GAP, TITLE = 128, 18, 24
DARK = {"denoise": (24, 95, 165), "cache": (193, 98, 18)}  # of the first step; later steps are lighter
PALE = {"denoise": (171, 209, 243), "cache": (250, 215, 170)}


def draw(panels: Sequence[tuple[str, Timeline]]) -> str:
    """An SVG of timelines above each other on one time axis.

    Args:
        panels: (title, timeline at unit costs). A fused item is framed.
    """
    steps = max(timeline.plan.steps for _, timeline in panels)
    length = max(timeline.time for _, timeline in panels)
    width = LEFT + UNIT * length + 24
    body: list[str] = []
    y = _legend(body, steps)
    for title, timeline in panels:
        body.append(_label(10, y + 15, title, anchor="start", weight="bold"))
        y += TITLE
        for rank in range(timeline.ranks):
            body.append(_label(LEFT - 8, y + 14, _rank_name(timeline, rank), anchor="end"))
            body.append(f'<path d="M{LEFT} {y + BOX + 2.5}H{LEFT + UNIT * length:g}" stroke="#e4e4e4"/>')
            for event in timeline.events:
                if event.rank == rank:
                    body += _boxes(timeline, event.start, event.end, event.items[0], y)
            y += LANE
        y += GAP
    body += _axis(length, y - GAP + 4)
    height = y + 18
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="Helvetica, Arial, sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>', *body, "</svg>"]) + "\n"


def _rank_name(timeline: Timeline, rank: int) -> str:
    first = sum(timeline.split[:rank])
    return f"rank {rank}: {steps_label(range(first, first + timeline.split[rank]))}"


def _colour(kind: str, step: int, steps: int) -> tuple[str, str]:
    """Fill, and a text colour that is readable on it."""
    share = step / max(1, steps - 1)
    mix = [round(dark + share * (pale - dark)) for dark, pale in zip(DARK[kind], PALE[kind], strict=True)]
    return f"#{mix[0]:02x}{mix[1]:02x}{mix[2]:02x}", "#fff" if share < 0.5 else "#111"


def _boxes(timeline: Timeline, start: float, end: float, item: BatchItem, y: float) -> list[str]:
    x, each = LEFT + UNIT * start, UNIT * (end - start) / len(item)
    boxes = []
    for i, task in enumerate(item):
        fill, ink = _colour(task.kind, task.step, timeline.plan.steps)
        boxes.append(_box(x + i * each, y, each, fill))
        boxes.append(_label(x + (i + 0.5) * each, y + 14.5, str(task.block), fill=ink))
    if len(item) > 1:
        w = UNIT * (end - start) - 2
        boxes.append(f'<rect x="{x + 1:g}" y="{y}" width="{w:g}" height="{BOX}" rx="3" fill="none" stroke="#111"/>')
    return boxes


def _legend(body: list[str], steps: int) -> float:
    x = 10.0
    for kind in ("denoise", "cache"):
        body.append(_label(x, 23, f"{kind}, step", anchor="start"))
        x += 96 if kind == "denoise" else 82
        for step in range(steps):
            fill, ink = _colour(kind, step, steps)
            body += [_box(x, 9, BOX, fill), _label(x + BOX / 2, 23.5, str(step), fill=ink)]
            x += BOX
        x += 24
    body.append(_label(x, 23, "number in a box: block", anchor="start"))
    return 44.0


def _axis(length: float, y: float) -> list[str]:
    marks = []
    for time in range(0, int(length) + 1, 4):
        x = LEFT + UNIT * time
        marks.append(f'<path d="M{x} {y - 4}v5" stroke="#777"/>')
        marks.append(_label(x, y + 14, str(time), fill="#555"))
    marks.append(_label(10, y + 14, "time in tasks", anchor="start", fill="#555"))
    return marks


def _box(x: float, y: float, width: float, fill: str) -> str:
    return f'<rect x="{x + 1:g}" y="{y:g}" width="{width - 2:g}" height="{BOX}" rx="3" fill="{fill}"/>'


def _label(x: float, y: float, label: str, anchor: str = "middle", fill: str = "#111", weight: str = "normal") -> str:
    bold = f' font-weight="{weight}"' if weight != "normal" else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}"{bold}>{escape(label)}</text>'
