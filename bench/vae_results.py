"""The table of the VAE benchmark, and what the VAE makes of the frames per second of whole rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GOAL_MS = 150.0  # a block of 480x832 on one H200
HEAD = ("VAE", "block ms p50 [p20, p80]", "frames per second of it alone", "peak GiB")


def measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "vae" in row and "block_ms" in row]


def fastest(rows: list[Row]) -> Row | None:
    return min(measured(rows), key=lambda row: row["block_ms"][1], default=None)


def with_vae(rollouts: list[Row], rows: list[Row]) -> list[Row]:
    """Rows of rollouts with the frames per second that remain where the same GPU decodes each block afterwards.

    Empty where no VAE was measured in the same run.
    """
    best = fastest(rows)
    if best is None:
        return [{**row, "fps_vae": None} for row in rollouts]
    return [
        {**row, "fps_vae": row["fps"] * row["block_ms"] / (row["block_ms"] + best["block_ms"][1])} for row in rollouts
    ]


def table(rows: list[Row]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---:|---:|---:|"]
    for row in measured(rows):
        low, middle, high = row["block_ms"]
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.3g}"
        lines.append(
            f"| {row['vae']} | {middle:.2f} [{low:.2f}, {high:.2f}] | {1e3 * row['frames'] / middle:.3g} | {peak} |"
        )
    lines.append("")
    best = fastest(rows)
    if best is not None and not best["rehearsal"]:
        lines.append(f"- goal: {best['vae']}: {best['block_ms'][1]:.1f} ms a block, wanted at most {GOAL_MS:g} ms")
    return lines + [f"- absent: {row['vae']}: {row['absent']}" for row in rows if "absent" in row]


def write(rows: list[Row], about: dict[str, str], folder: Path) -> Path:
    """vae.md and vae.json; the path of the first."""
    lines = [f"# The VAE: {about['device']}", "", "`pytest bench/bench_vae.py --benchmark-only`", ""]
    if rows[0]["rehearsal"]:
        lines += ["**REHEARSAL on a CPU with a narrow VAE and small frames: these figures mean nothing.**", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += [
        "",
        "Wan 2.1's VAE with random weights in bfloat16: a block of 3 latent frames, 12 pixel frames of 480x832, in the",
        "middle of a video, with the features of the frames before it at hand.",
        "",
        *table(rows),
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vae.md").write_text("\n".join(lines), encoding="utf-8")
    (folder / "vae.json").write_text(json.dumps({"environment": about, "rows": rows}, indent=1), encoding="utf-8")
    return folder / "vae.md"
