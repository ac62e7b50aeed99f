"""The results of a run of the op benchmarks: a row for each measured way, the limits of the machine, the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from measure import Bench, environment, result_folder

CUDA = torch.cuda.is_available()
BENCH = Bench("cuda" if CUDA else "cpu", (8, 40) if CUDA else (3, 3), 0.3 if CUDA else 0.0)
REHEARSAL = "REHEARSAL at small sizes on a CPU: these figures mean nothing, only the path was tried"
ROWS: list[dict[str, Any]] = []
ABSENT: dict[str, str] = {}  # what could not be measured here, and why
LIMITS: dict[str, float] = {}  # "flop" and "bytes" per second


def table() -> list[str]:
    """Markdown. A speedup stands only where every way of that op and direction is right, and never in a rehearsal."""
    names = ("op", "pass", "way", "device ms p50 [p20, p80]", "rate", "of limit", "speedup")
    lines = ["| " + " | ".join(names) + " |", "|---|---|---|---:|---:|---:|---:|"]
    wrong = {(row["op"], row["pass"]) for row in ROWS if "error" in row}
    base = {(row["op"], row["pass"]): row["ms"][1] for row in ROWS if row.get("baseline")}
    for row in ROWS:
        key = (row["op"], row["pass"])
        if "error" in row:
            lines.append(f"| {row['op']} | {row['pass']} | {row['way']} | failed | | | |")
            continue
        low, middle, high = row["ms"]
        rate = f"{row['rate'] / 1e12:.3g} TFLOP/s" if row["unit"] == "flop" else f"{row['rate'] / 1e9:.4g} GB/s"
        told = CUDA and key in base and key not in wrong
        speedup = f"{base[key] / middle:.2f}x" if told else ""
        cells = [*key, row["way"], f"{middle:.3f} [{low:.3f}, {high:.3f}]", rate, f"{row['of_limit']:.0%}", speedup]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [""] + [f"- failed: {r['op']} {r['pass']} {r['way']}: {r['error']}" for r in ROWS if "error" in r]
    return lines + [f"- absent: {name}: {why}" for name, why in ABSENT.items()]


def write(folder: Path | None) -> Path:
    """ops.md and ops.json; the path of the first."""
    about = environment(BENCH.device)
    if folder is None:
        folder = result_folder(about) if CUDA else Path(__file__).resolve().parents[1] / "out" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    limits = [f"{n / 1e12:.3g} TFLOP/s" if unit == "flop" else f"{n / 1e9:.4g} GB/s" for unit, n in LIMITS.items()]
    lines = [f"# Ops: {about['device']}", "", "`pytest bench/ --benchmark-only`", ""]
    lines += [] if CUDA else [f"**{REHEARSAL}.**", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += [f"- limits: {', '.join(limits)} (a large matmul, a large copy, in the same run)", ""]
    lines += [
        "Device time by CUDA events, L2 flushed before each repetition; rates count the work that must be done, not"
    ]
    lines += [
        "what an implementation does. Speedups are over an op's first way: eager, for attention torch's fused one.",
        "",
    ]
    (folder / "ops.md").write_text("\n".join([*lines, *table(), ""]), encoding="utf-8")
    kept = {"rehearsal": not CUDA, "environment": about, "limits": LIMITS, "absent": ABSENT, "rows": ROWS}
    (folder / "ops.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return folder / "ops.md"
