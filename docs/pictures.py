"""The pictures of the pages, as SVG: drawn from the plan, the mask, the cache and the files of bench/results.

`make docs-refresh` writes them into docs/pictures/, `make docs-check` tells which are stale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from drawing import BLUE, GREEN, GREY, INK, ORANGE, PALE, Picture, bars, dots, lines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


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
