"""The table of the rollout benchmarks, beside the goals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# (rollout, figure, goal): on one H200, Wan 1.3B, 480x832, window 21, VAE excluded
GOALS = (
    ("HiAR stream, graph", "visit_ms", "at most", 66.0),
    ("HiAR wavefront, graph", "visit_ms", "at most", 61.0),
    ("HiAR wavefront, pairs, graph", "visit_ms", "at most", 61.0),
    ("HiAR stream, graph", "fps", "at least", 24.0),
    ("block-first, graph", "fps", "at least", 36.0),
)
COLUMNS = {
    "rollout": "rollout", "visit_ms": "visit ms", "block_ms": "block ms", "fps": "fps without VAE",
    "fps_vae": "fps with VAE",
    "of_roofline": "of roofline", "launches": "launches a visit", "syncs": "syncs a visit", "peak_gib": "peak GiB",
    "cold_s": "cold start s", "loss": "largest loss",
}  # fmt: skip


def largest_loss(row: Row) -> str:
    """The kind of work that lies furthest above its limit, in milliseconds a visit."""
    parts = {part["name"]: 1e3 * (part["seconds"] - part["limit"]) for part in row["parts"]}
    name = max(parts, key=lambda part: parts[part])
    return f"{name} +{parts[name]:.2f} ms"


def table(rows: list[Row]) -> list[str]:
    """Markdown: the baseline of a speedup is the block-first row of the same executor."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"]
    for row in rows:
        cells = []
        for key in COLUMNS:
            value = largest_loss(row) if key == "loss" else row[key]
            cells.append(value if isinstance(value, str) else "" if value is None else f"{value:.3g}")
        lines.append("| " + " | ".join(cells) + " |")
    by_name = {row["rollout"]: row for row in rows}
    lines.append("")
    for name, figure, sense, goal in GOALS:
        if name in by_name and not by_name[name]["rehearsal"]:
            lines.append(f"- goal: {name}: {COLUMNS[figure]} {by_name[name][figure]:.3g}, wanted {sense} {goal:g}")
    return lines


def write(rows: list[Row], about: dict[str, str], folder: Path) -> Path:
    """rollout.md and rollout.json; the path of the first."""
    lines = [f"# Rollouts: {about['device']}", "", "`pytest bench/ --benchmark-only`", ""]
    if rows[0]["rehearsal"]:
        lines += ["**REHEARSAL on a CPU with the toy's sizes: these figures mean nothing.**", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += [
        "",
        "Wan 1.3B with random weights, 480x832, window of 21 latent frames, blocks of 3, 4 steps, steady state, one",
        "GPU. A visit is one forward of one block; block-first makes 5 of them a block, HiAR 8. The roofline is the",
        "FLOP and the bytes of a visit at the rates of a large matmul and a large copy in the same run. With the VAE",
        "the same GPU decodes each block when it is done (vae.md, the fastest way); empty: not measured in this run.",
        "",
        *table(rows),
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rollout.md").write_text("\n".join(lines), encoding="utf-8")
    (folder / "rollout.json").write_text(json.dumps({"environment": about, "rows": rows}, indent=1), encoding="utf-8")
    return folder / "rollout.md"
