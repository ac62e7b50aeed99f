"""The results of the op benchmarks: a row for each measured way; a table, a plot, the dispatcher's choices."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from hiar_kernels.attention.table import SHAPES, Measurement, label, measurements
from measure import Bench, result_folder
from resume import sources

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = ROOT / "out" / "gpu-test.jsonl"
CUDA = torch.cuda.is_available()
BENCH = Bench("cuda" if CUDA else "cpu", (8, 40) if CUDA else (3, 3), 0.3 if CUDA else 0.0)
REHEARSAL = "REHEARSAL at small sizes on a CPU: these figures mean nothing, only the path was tried"
ABSENT: dict[str, str] = {}  # what could not be measured here, and why
TRAINED = ("block_causal", "constant_context", "bidirectional")  # shapes that win by forward and backward together
Row = dict[str, Any]


def named(row: Row) -> str:
    return f"{row['op']} {row['pass']} {row['way']}"


def measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "ms" in row]


def wrong(rows: list[Row]) -> set[tuple[str, str]]:
    return {(row["op"], row["pass"]) for row in rows if "error" in row}


def failing(journal: Path = GPU_TESTS) -> list[str]:
    """The kernel tests that `make gpu-test` last saw fail on these very sources."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    if not lines or lines[0].get("sources") != sources(ROOT):
        return []
    last = {line["test"]: line["outcome"] for line in lines[1:] if "outcome" in line}
    return [test for test, outcome in last.items() if outcome != "passed"]


def table(rows: list[Row], red: list[str] | None = None) -> list[str]:
    """Markdown. A speedup stands only where every way of that op and direction is right, and never in a rehearsal.

    None stands while a kernel test is ``red`` (default: those :func:`failing`).
    """
    red = failing() if red is None else red
    names = ("op", "pass", "way", "device ms p50 [p20, p80]", "rate", "of limit", "speedup")
    lines = ["| " + " | ".join(names) + " |", "|---|---|---|---:|---:|---:|---:|"]
    base = {(row["op"], row["pass"]): row["ms"][1] for row in measured(rows) if row["baseline"]}
    for row in rows:
        key = (row["op"], row["pass"])
        if "ms" not in row:
            lines.append(f"| {row['op']} | {row['pass']} | {row['way']} | {_kind(row)} | | | |")
            continue
        low, middle, high = row["ms"]
        rate = f"{row['rate'] / 1e12:.3g} TFLOP/s" if row["unit"] == "flop" else f"{row['rate'] / 1e9:.4g} GB/s"
        told = not red and not row["rehearsal"] and key in base and key not in wrong(rows)
        speedup = f"{base[key] / middle:.2f}x" if told else ""
        cells = [*key, row["way"], f"{middle:.3f} [{low:.3f}, {high:.3f}]", rate, f"{row['of_limit']:.0%}", speedup]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"- no speedup is told, {len(red)} of make gpu-test fail: {', '.join(red[:3])}"] if red else []
    for row in measured(rows):
        if row["goal_ms"] is not None and not row["rehearsal"]:
            lines.append(f"- goal: {named(row)}: {row['ms'][1]:.3f} ms, wanted at most {row['goal_ms']} ms")
    lines += [f"- {_kind(row)}: {named(row)}: {row[_said(row)]}" for row in rows if "ms" not in row]
    return lines + [f"- absent: {name}: {why}" for name, why in ABSENT.items()]


def _said(row: Row) -> str:
    return "error" if "error" in row else "refused"


def _kind(row: Row) -> str:
    return "failed" if "error" in row else "refused"


def best(rows: list[Row], source: str) -> list[Measurement]:
    """The right implementations of attention at each shape, the fastest first, down to the first kernel of our own:
    that one runs without a layout too. Where it is trained, by forward and backward together.

    Args:
        source: GPU, versions, date and revision.
    """
    bad, found = wrong(rows), []
    for shape in SHAPES:
        passes = ("forward", "backward") if shape in TRAINED else ("forward",)
        times: dict[tuple[int, str, int], dict[str, float]] = {}
        for row in measured(rows):
            if row.get("shape") == shape and "impl" in row and (row["op"], row["pass"]) not in bad:
                times.setdefault((row["arch"], row["impl"], row["num_splits"]), {})[row["pass"]] = row["ms"][1]
        total = {key: sum(by.values()) for key, by in times.items() if set(by) == set(passes)}
        for arch in sorted({key[0] for key in total}):
            ranked = sorted((ms, impl, splits) for (a, impl, splits), ms in total.items() if a == arch)
            taken: set[str] = set()
            for ms, impl, splits in ranked:
                if impl in taken:
                    continue
                taken.add(impl)
                others = {label(*other): round(late, 3) for late, *other in ranked if other != [impl, splits]}
                found.append(Measurement(arch, shape, impl, splits, round(ms, 3), others, source))
                if impl == "triton":  # it takes whatever a call is made of
                    break
    return found


def merged(new: list[Measurement], old: tuple[Measurement, ...]) -> list[dict[str, Any]]:
    """The dispatcher's table; what was measured now replaces what it held for the same architecture and shape."""
    fresh = {(row.architecture, row.shape) for row in new}
    kept = [row for row in old if (row.architecture, row.shape) not in fresh]
    return [dataclasses.asdict(row) for row in sorted([*kept, *new], key=lambda row: (row.architecture, row.shape))]


def plot(rows: list[Row], title: str, file: Path) -> str:
    """Bars of the part of the machine's limit that every op and way reaches; says what became of it."""
    rows = measured(rows)
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed"
    if not rows:
        return "no plot: nothing was measured"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ways = list(dict.fromkeys(row["way"] for row in rows))
    colours = {way: f"C{i}" if way != "triton" else "black" for i, way in enumerate(ways)}
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.19 * len(rows)))
    places = [i + 0.6 * len({(r["op"], r["pass"]) for r in rows[: i + 1]}) for i in range(len(rows))]
    axes.barh(places, [100 * row["of_limit"] for row in rows], height=0.85, color=[colours[r["way"]] for r in rows])
    axes.set_yticks(places, [named(row) for row in rows], fontsize=6)
    axes.set_ylim(places[-1] + 1, places[0] - 1)
    axes.set_xlabel("% of the large matmul's FLOP/s (attention) or of the large copy's bytes/s (the others)")
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return f"![part of the limit]({file.name})"


def default_folder(about: dict[str, str]) -> Path:
    """Where results go: those of a GPU are to be kept."""
    return result_folder(about) if CUDA else Path(__file__).resolve().parents[1] / "out" / "bench"


def write(rows: list[Row], about: dict[str, str], folder: Path) -> Path:
    """ops.md, ops.json, ops.png and, from a GPU, measured.json; the path of the first.

    Args:
        about: what :func:`measure.environment` said when the run began.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limits = {row["unit"]: row["limit"] for row in measured(rows)}  # of the last run that measured
    told = [f"{n / 1e12:.3g} TFLOP/s" if unit == "flop" else f"{n / 1e9:.4g} GB/s" for unit, n in limits.items()]
    title = f"Ops: {about['device']}, {about['date'][:10]}, revision {about['revision']}"
    lines = [f"# Ops: {about['device']}", "", "`pytest bench/ --benchmark-only`", ""]
    lines += [] if CUDA else [f"**{REHEARSAL}.**", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += [f"- limits: {', '.join(told) or 'not measured'} (a large matmul, a large copy, in the same run)", ""]
    lines += [
        "Device time by CUDA events, L2 flushed before each repetition; rates count the work that must be done, not",
        "what an implementation does. Speedups are over an op's first way: eager, for attention torch's fused one.",
        "",
        plot(rows, title if CUDA else f"REHEARSAL, no figures. {title}", folder / "ops.png"),
        "",
    ]
    (folder / "ops.md").write_text("\n".join([*lines, *table(rows), ""]), encoding="utf-8")
    kept = {"rehearsal": not CUDA, "environment": about, "limits": limits, "absent": ABSENT, "rows": rows}
    (folder / "ops.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    if CUDA and not failing():
        versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "cudnn", "triton") if name in about)
        source = f"{about['device']}, {versions}, {about['date'][:10]}, revision {about['revision']}"
        whole = merged(best(rows, source), measurements())
        (folder / "measured.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return folder / "ops.md"
