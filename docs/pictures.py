"""The pictures of the pages, as SVG: drawn from the plan, the mask, the cache and the files of bench/results.

`make docs-refresh` writes them into docs/pictures/, `make docs-check` tells which are stale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
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


# The method


def grid(order: str, title: str) -> str:
    """Steps by blocks: the numbers say in which order tasks run, arrows what one of them reads."""
    from hiar_model.schedule.plan import Plan, denoise, dependencies

    plan, blocks, chosen = Plan(4, order, 3), 4, denoise(1, 2)
    tasks = [task for group in plan.groups(blocks) for item in group for task in item]
    number = {task: i for i, task in enumerate((t for t in tasks if t.kind == "denoise"), 1)}
    left, top, w, h = 74, 64, 70, 44
    picture = Picture(left + blocks * w + 14)
    picture.text(8, 20, title, bold=True, size=14)

    def place(step: int, block: int) -> tuple[float, float]:
        return left + block * w, top + step * h

    for block in range(blocks):
        picture.text(left + block * w + w / 2 - 4, top - 10, f"block {block}", "middle", "#555")
    sources = {(task.step, task.block) for task in dependencies(plan, chosen) if task.kind == "cache"}
    for step in range(4):
        picture.text(8, top + step * h + 24, f"step {step}", fill="#555")
        for block in range(blocks):
            x, y = place(step, block)
            read = (step, block) in sources
            here = (step, block) == (chosen.step, chosen.block)
            picture.box(
                x, y, w - 8, h - 8, BLUE if here else PALE[ORANGE] if read else "#f1f1f1", ORANGE if read else ""
            )
            ink = "#fff" if here else INK
            picture.text(x + w / 2 - 4, y + 23, str(number[denoise(step, block)]), "middle", ink, 14)
    cx, cy = place(chosen.step, chosen.block)
    for step, block in sorted(sources):
        x, y = place(step, block)
        if step == chosen.step:  # over the top of what lies between
            end = cx + 12 + 12 * block
            picture.line([(x + w / 2, y), (x + w / 2, y - 5), (end, y - 5), (end, cy - 1)], INK, 1.4, arrow=True)
        else:
            picture.line([(x + w - 14, y), (cx + 6, cy + h - 8)], INK, 1.4, arrow=True)
    return picture.svg()


def forwards() -> str:
    """The forwards that one block costs, by kind of context."""
    from hiar_model.schedule.plan import Plan

    kinds = [
        ("block-first (clean context)", Plan(4, "block_first", 3)),
        ("HiAR (matched noise)", Plan(4, "stream", 3)),
        ("HiAR with shared KV", Plan(4, "stream", 3, kv_source="next_step")),
    ]
    w, gap = 58, 6
    picture, y = Picture(8 * (w + gap) + 20), 4.0
    for name, plan in kinds:
        tasks = [t for group in plan.groups(4) for item in group for t in item if t.block == 1]
        tasks.sort(key=lambda task: (task.step, task.kind == "cache"))
        picture.text(10, y + 16, f"{name}: {len(tasks)} forwards of the network for a block", bold=True)
        for i, task in enumerate(tasks):
            x, colour = 10 + i * (w + gap), BLUE if task.kind == "denoise" else ORANGE
            picture.box(x, y + 26, w, 30, PALE[colour], colour)
            picture.text(x + w / 2, y + 46, f"{task.kind} {task.step}".replace("denoise", "den."), "middle", size=12)
            shared = task.kind == "denoise" and task.step > 0 and plan.kv_source == "next_step"
            if shared:
                begin, end = x + w / 2, x - gap - w / 3
                bend = [(begin, y + 57), (begin, y + 66), (end, y + 66), (end, y + 59)]
                picture.line(bend, INK, 1.2, arrow=True)
        y += 80
    return picture.svg()


def window() -> str:
    """Which latent frames the blocks of a video see, and the slot of each in the ring."""
    import torch

    from hiar_kernels import BlockCausal
    from hiar_model.config import WanConfig
    from hiar_model.models.kv_cache import RingCache

    size, seen, sink, blocks, cell = 3, 12, 3, 8, 17
    frames, mask = size * blocks, BlockCausal(1, size, seen, sink)
    visible = mask.visible(torch.arange(frames)[None], torch.arange(frames)[None], 1)[0]
    picture, left, top = Picture(66 + frames * cell + 10), 66, 44
    picture.text(8, 18, f"frames that a block sees: blocks of {size}, window {seen}, sink {sink}", bold=True)
    for j in range(0, frames, size):
        picture.text(left + j * cell + cell / 2, top - 8, str(j), "middle", "#555", 11)
    for block in range(blocks):
        y = top + block * cell
        picture.text(8, y + 13, f"block {block}", fill="#555", size=12)
        for j in range(frames):
            own = j // size == block
            fill = BLUE if own else ORANGE if visible[block * size, j] and j < sink else PALE[BLUE]
            fill = fill if visible[block * size, j] else "#f4f4f4"
            picture.box(left + j * cell, y, cell - 2, cell - 2, fill, r=2)
    y, x = top + blocks * cell + 18, 8.0
    for fill, name in ((BLUE, "its own"), (PALE[BLUE], "window"), (ORANGE, "sink"), ("#f4f4f4", "not seen")):
        picture.box(x, y - 11, 13, 13, fill, "#bbb", r=2)
        picture.text(x + 18, y, name, size=12)
        x += 34 + 7 * len(name)

    config = WanConfig(16, 32, 2, 1, text_dim=6, text_len=5, in_channels=4, out_channels=4)
    ring = RingCache(config, [seen], 1, 1, sink)
    y += 34
    picture.text(8, y, "frame in each slot of the ring, after each block", bold=True)
    y += 12
    held = [-1] * seen
    for block in range(blocks):
        own = list(range(block * size, (block + 1) * size))
        for slot, frame in zip(ring.slots(0, own), own, strict=True):
            held[slot] = frame
        picture.text(8, y + 13, f"block {block}", fill="#555", size=12)
        for slot, frame in enumerate(held):
            fill = BLUE if frame in own else "#f4f4f4" if frame < 0 else ORANGE if frame < sink else PALE[BLUE]
            picture.box(left + slot * 30, y, 28, cell - 2, fill, r=2)
            if frame >= 0:
                ink = "#fff" if fill in (BLUE, ORANGE) else INK
                picture.text(left + slot * 30 + 14, y + 12, str(frame), "middle", ink, 11)
        y += cell
    return picture.svg()


def masks() -> str:
    """Four masks of the attention op: rows are frames of queries, columns frames of keys."""
    import torch

    from hiar_kernels import BlockCausal
    from hiar_kernels.attention.mask import visible_with_context

    cell, size = 15, 3
    twelve, slots = torch.arange(12)[None], torch.tensor([[9, 10, 11, 0, 7, 8, -1]])
    block, wide = torch.tensor([[9, 10, 11]]), BlockCausal(1, size, 6, 1)
    panels = [
        ("block-causal", twelve, twelve, BlockCausal(1, size).visible(twelve, twelve, 1)[0]),
        ("window 6, sink 1", twelve, twelve, wide.visible(twelve, twelve, 1)[0]),
        ("a block over a ring (-: empty)", block, slots, wide.visible(block, slots, 1)[0]),
        (
            "teacher forcing: context | own",
            twelve,
            torch.cat([twelve, twelve], 1),
            visible_with_context(BlockCausal(1, size), twelve, twelve, twelve, 1)[0],
        ),
    ]
    picture, x, y, lowest = Picture(480), 8.0, 4.0, 0.0
    for title, rows, columns, shown in panels:
        wide_panel = columns.shape[1] * cell + 40
        if x > 8 and x + wide_panel > 480:
            x, y, lowest = 8.0, lowest + 14, 0.0
        picture.text(x, y + 16, title, bold=True)
        for j, frame in enumerate(columns[0].tolist()):
            picture.text(x + 26 + j * cell + 7, y + 34, "-" if frame < 0 else str(frame), "middle", "#777", 9)
        for i, frame in enumerate(rows[0].tolist()):
            picture.text(x + 18, y + 48 + i * cell, str(frame), "end", "#777", 9)
            for j in range(columns.shape[1]):
                gap = 8 if title.startswith("teacher") and j >= 12 else 0
                fill = BLUE if shown[i, j] else "#f1f1f1"
                picture.box(x + 24 + j * cell + gap, y + 38 + i * cell, cell - 2, cell - 2, fill, r=1)
        lowest, x = max(lowest, picture.height), x + max(wide_panel, 8.2 * len(title)) + 10
    return picture.svg()


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


# What was measured


def evaluations(folder: str, variant: str, order: str, frames: int) -> list[dict]:
    """Rows of `hiar evaluate --json`, one for each training seed."""
    rows = []
    for path in sorted((RESULTS / folder).glob(f"{variant}-seed*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            rollout = row.get("rollout", row)
            if (rollout["order"], row["num_frames"]) == (order, frames):
                rows.append(row)
    if not rows:
        raise ValueError(f"bench/results/{folder} has no {variant} in order {order} with {frames} frames")
    return rows


def two_orders(title: str, folder: str, variant: str, matched: str = "stream") -> str:
    """Valid frames of one set of weights in HiAR's order and in block_first, by eighth of 384 frames."""
    orders = [(matched, "matched noise (HiAR)", BLUE), ("block_first", "clean context", ORANGE)]
    series = []
    for order, name, colour in orders:
        rows = evaluations(folder, variant, order, 384)
        series.append((name, colour, [[100 * part["valid"] for part in row["parts"]] for row in rows]))
    return lines(title, "eighth of a video of 384 frames", series)


def eight_bits() -> str:
    from bench.studies.eight_bits_table import by_eighth

    shown = [("bfloat16", "bfloat16", BLUE), ("all_int8", "8 bits, layers in int8", GREEN)]
    shown.append(("all", "8 bits, layers in e4m3", ORANGE))
    series = [(name, colour, by_eighth("scenes", "stream", variant)) for variant, name, colour in shown]
    return lines("Valid frames, %: bfloat16 and 8 bits", "eighth of a video of 384 frames", series)


Value = Callable[[dict], float]
VALID: tuple[str, Value, int] = "valid frames, %", lambda row: 100 * row["whole"]["valid"], 1
DRIFT: tuple[str, Value, int] = "valid, last eighth less first, points", lambda row: 100 * row["drift"], 1
SPEED: tuple[str, Value, int] = "speed over the prompted one", lambda row: row["whole"]["speed_ratio"], 2
BACKGROUND: tuple[str, Value, int] = (
    "background: distance from the first frames", lambda row: row["parts"][-1]["background_change"], 3,
)  # fmt: skip
CONTRAST: tuple[str, Value, int] = (
    "texture's contrast over the first frames'", lambda row: row["parts"][-1]["texture_ratio"], 2,
)  # fmt: skip


def variants(
    title: str, folder: str, shown: Sequence[tuple[str, str, str]], measures: Sequence[tuple[str, Value, int]]
) -> str:
    """Dots of variants (file, order, name), those with clean context in orange."""
    rows = [
        (name, ORANGE if order == "block_first" else BLUE, evaluations(folder, variant, order, 384))
        for variant, order, name in shown
    ]
    panels = [
        (about, [(name, colour, [value(row) for row in each]) for name, colour, each in rows], digits)
        for about, value, digits in measures
    ]
    return dots(title, panels)


def students() -> str:
    shown = [("hiar", "stream", "HiAR"), ("no_forward_kl", "stream", "without forward KL"),
             ("self_forcing", "block_first", "Self-Forcing"), ("shared_kv", "stream", "shared KV"),
             ("windows", "stream", "windows per step"), ("ode_init", "stream", "start, matched"),
             ("ode_init", "block_first", "start, clean")]  # fmt: skip
    title = "Students of one start that hardly drifts, 384 frames"
    return variants(title, "toy-training", shown, [VALID, DRIFT, SPEED])


def students_of_drifting_start() -> str:
    shown = [("hiar", "stream", "HiAR"), ("no_forward_kl", "stream", "without forward KL"),
             ("self_forcing_forward_kl", "block_first", "clean, forward KL"),
             ("self_forcing", "block_first", "Self-Forcing")]  # fmt: skip
    shown = [(f"{variant}_from_teacher_forcing", order, name) for variant, order, name in shown]
    title = "Students of one start that drifts, 384 frames"
    return variants(title, "toy-training-probes", shown, [DRIFT, BACKGROUND, CONTRAST, SPEED])


def newest_gpu() -> Path:
    from bench.lib.gpu_tables import folders

    return next(folder for folder in reversed(folders()) if (folder / "ops.json").exists())


def attention_rates() -> str:
    """Attention of one task on the newest measured GPU."""
    values = json.loads((newest_gpu() / "ops.json").read_text(encoding="utf-8"))
    names = {"gluon": "ours, for Hopper (gluon)", "triton": "ours, in Triton", "cudnn": "cuDNN, one call",
             "cudnn with num_splits=2": "cuDNN, two calls merged", "sdpa": "torch's SDPA"}  # fmt: skip
    rows = [row for row in values["rows"] if row["op"] == "attention: visit" and row["way"] in names]
    rows.sort(key=lambda row: -row["rate"])
    shown = [(names[row["way"]], [(row["rate"], BLUE if row["way"] in ("gluon", "triton") else GREY)],
              f"{row['rate'] / 1e12:.0f}") for row in rows]  # fmt: skip
    limit = values["limits"]["flop"]
    title = f"Attention of one task, TFLOP/s, {values['environment']['device']}"
    return bars(title, shown, limit=(limit, f"large matrix product: {limit / 1e12:.0f}"))


def task_parts() -> str:
    """Where the milliseconds of a task go, before and after a change, on the newest measured GPU."""
    from bench.lib.gpu_tables import rollouts

    colours = {"attention": BLUE, "matmul": GREEN, "pointwise": ORANGE, "copy": "#7b5aa6", "idle": "#c9c9c9"}
    rows = []
    for m in rollouts(newest_gpu()):
        parts = {name: value for name, value in m.milliseconds.items() if name in colours}
        where = m.note.removeprefix("revision ")
        rows.append(
            (f"{m.rollout.split(',')[0]}, {where}", [(parts[n], colours[n]) for n in parts], f"{m.task:.1f} ms")
        )
    return bars("A task of Wan 1.3B on one H200, ms", rows, [(colour, name) for name, colour in colours.items()])


def gains() -> str:
    """What four GPUs gain, by link, projected from timed tasks."""
    from bench.lib.gpu_tables import stage_times, vae_ms
    from bench.lib.strategies import machines, strategies

    times = stage_times()
    picked = {"block_first, Ulysses over 4": ORANGE, "stream, Ulysses over 4": "#e8b27d", "pipeline of 4": BLUE}
    legend = [(colour, name.removesuffix(" over 4").removesuffix(" of 4")) for name, colour in picked.items()]
    rows = []
    for machine in machines(times, vae_ms=vae_ms(times.parent)[1] or 0.0) if times else ():
        by_name = {strategy.name: strategy for strategy in strategies(machine)}
        base = by_name["block_first"].run(27).time
        for i, (name, colour) in enumerate(picked.items()):
            gain = base / by_name[name].run(27).time
            rows.append((machine.link.name.partition(" (")[0] if not i else "", [(gain, colour)], f"{gain:.2f}"))
    return bars("Gain of 4 GPUs over one that runs block-first (projected)", rows, legend)


PICTURES = {
    "grid_block_first.svg": lambda: grid("block_first", "block-first: clean context"),
    "grid_hiar.svg": lambda: grid("step_first", "HiAR: matched noise"),
    "forwards.svg": forwards,
    "window.svg": window,
    "masks.svg": masks,
    "claim_same_weights.svg": lambda: two_orders(
        "Valid frames, %: the same weights in two orders", "toy-training", "teacher_forcing"
    ),
    "claim_students.svg": students,
    "claim_drifting_start.svg": students_of_drifting_start,
    "attention_rates.svg": attention_rates,
    "eight_bits.svg": eight_bits,
    "task_parts.svg": task_parts,
    "gains.svg": gains,
}


def pictures() -> dict[str, str]:
    """File name in docs/pictures -> SVG, the timelines of the schedule among them."""
    from bench.studies.parallel import pictures as timelines

    return {**timelines(), **{name: draw() for name, draw in PICTURES.items()}}
