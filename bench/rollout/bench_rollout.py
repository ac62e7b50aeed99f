"""Whole rollouts of Wan 1.3B at 480x832, window 21, random weights: every order, eager and captured, in one table.

On a CPU the same code runs the toy's sizes, as a rehearsal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib import report
from bench.lib.machine import CUDA
from hiar_model.benchmark.run import bench
from hiar_model.benchmark.setting import Setting

# rollout: (order, fuse_cache_denoise, cuda_graph)
CASES = {
    "block-first, eager": ("block_first", False, False),
    "block-first, graph": ("block_first", False, True),
    "HiAR stream, eager": ("stream", False, False),
    "HiAR stream, graph": ("stream", False, True),
    "HiAR stream, fused, graph": ("stream", True, True),
    "HiAR wavefront, graph": ("wavefront", False, True),
    "HiAR wavefront, fused, graph": ("wavefront", True, True),
}
FULL: dict[str, Any] = {"model": "wan2.1-t2v-1.3b", "device": torch.device("cuda"), "blocks": 2}
SMALL: dict[str, Any] = {"model": "toy", "layers": 2, "device": torch.device("cpu"), "blocks": 1}
Row = dict[str, Any]
# (rollout, figure, sense, goal): on one H200, Wan 1.3B, 480x832, window 21, VAE excluded
GOALS = (
    ("HiAR stream, graph", "visit_ms", "at most", 66.0),
    ("HiAR wavefront, graph", "visit_ms", "at most", 61.0),
    ("HiAR wavefront, fused, graph", "visit_ms", "at most", 61.0),
    ("HiAR stream, graph", "fps", "at least", 24.0),
    ("block-first, graph", "fps", "at least", 36.0),
)
COLUMNS = {
    "visit_ms": "task ms", "block_ms": "block ms", "fps": "fps without VAE", "fps_vae": "fps with full VAE",
    "fps_small_vae": "fps with small VAE",
    "of_roofline": "of roofline", "launches": "launches a task", "syncs": "syncs a task", "peak_gib": "peak GiB",
    "cold_s": "cold start s",
}  # fmt: skip


def row_of(name: str, result: dict[str, Any]) -> Row:
    """A rollout's row, from a result of `hiar bench`: what its table shows and, under "parts", where the time went."""
    parts, speed, cold = result["parts"], result["speeds"][0], result["cold_start"]
    peak = speed["device_peak_bytes"]
    return {
        "rollout": name,
        "visit_ms": 1e3 * parts["seconds"],
        "block_ms": 1e3 * parts["seconds"] * result["measured"]["forwards_per_block"],
        "fps": speed["fps"],
        "of_roofline": sum(part["limit"] for part in parts["parts"]) / parts["seconds"],
        "launches": parts["launches"],
        "syncs": parts["syncs"],
        "peak_gib": None if peak is None else peak / 2**30,
        "cold_s": cold["load_s"] + cold["warm_up_s"],
        "parts": parts["parts"],
        "rehearsal": not CUDA,
    }


@pytest.mark.parametrize("name", CASES)
def test_rollout(benchmark: Any, record_property: Any, name: str) -> None:
    order, fuse, captured = CASES[name]
    setting = Setting(
        rollout={"order": order, "window_frames": 21 if CUDA else 6, "fuse_cache_denoise": fuse},
        cuda_graph=captured and CUDA, repeats=1, **(FULL if CUDA else SMALL),
    )  # fmt: skip
    options = {"decode": False, "plain": False, "parts": True}
    row = row_of(name, benchmark.pedantic(bench, (setting,), options, rounds=1))
    benchmark.extra_info.update(row)
    record_property("row", row)
    if CUDA:
        torch.cuda.empty_cache()


def largest_loss(row: Row) -> str:
    """The kind of work that lies furthest above its limit, in milliseconds a task."""
    parts = {part["name"]: 1e3 * (part["seconds"] - part["limit"]) for part in row["parts"]}
    name = max(parts, key=lambda part: parts[part])
    return f"{name} +{parts[name]:.2f} ms"


def table(rows: list[Row]) -> list[str]:
    """Markdown."""
    cells = []
    for row in rows:
        figures = ["" if row.get(key) is None else f"{row[key]:.3g}" for key in COLUMNS]
        cells.append([row["rollout"], *figures, largest_loss(row)])
    lines = [*report.table(["rollout", *COLUMNS.values(), "largest loss"], cells), ""]
    by_name = {row["rollout"]: row for row in rows if not row["rehearsal"]}
    for name, figure, sense, goal in GOALS:
        if name in by_name:
            lines.append(f"- goal: {name}: {COLUMNS[figure]} {by_name[name][figure]:.3g}, {sense} {goal:g}")
    return lines


def write(rows: list[Row], about: dict[str, str], folder: Path) -> Path:
    """rollout.md and rollout.json; the path of the first."""
    body = [
        "Wan 1.3B with random weights, 480x832, window of 21 latent frames, blocks of 3, 4 steps, steady state, one",
        "GPU. A task is one forward of one block; block-first makes 5 of them a block, HiAR 8. The roofline is the",
        "FLOP and the bytes of a task at the rates of a large matmul and a large copy in the same run. With the VAE",
        "the same GPU decodes each block when it is done (vae.md, the fastest of each kind); empty: not measured",
        "in this run.",
        "",
        *table(rows),
    ]
    rehearsal = "on a CPU with the toy's sizes" if rows[0]["rehearsal"] else ""
    command, result = "pytest bench/rollout/bench_rollout.py --benchmark-only", {"environment": about, "rows": rows}
    return report.write("rollout", folder, about, "Rollouts", command, body, result, rehearsal)
