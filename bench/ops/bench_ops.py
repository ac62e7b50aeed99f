"""Every op, forward and backward, by every variant this machine has; the table, the dispatcher's choices.

What is wrong is a failure, not a figure.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.lib import report
from bench.lib.machine import CUDA, ROOT, error_line, sources
from bench.lib.measure import Bench, check_all, default_bench, percentiles
from bench.ops import op_cases
from bench.ops.attention_cases import parsed
from bench.ops.work import SMALL, Op, Sizes, Work, timed
from hiar_kernels.attention.selection import SHAPES, Measurement, measurements
from hiar_kernels.attention.selection import label as impl_label

BENCH = default_bench()
GPU_TESTS = ROOT / "out" / "gpu-test.jsonl"
ABSENT: dict[str, str] = {}  # what could not be measured here, and why
TRAINED = ("block_causal", "constant_context", "bidirectional")  # shapes that win by forward and backward together
ARCHITECTURE = int("".join(map(str, torch.cuda.get_device_capability()))) if CUDA else 0
Row = dict[str, Any]


def cases(bench: Bench, absent: dict[str, str]) -> dict[str, tuple[Op, str, str]]:
    """Name of a test -> op, direction, variant: all that a device has."""
    return {
        f"{op.label}-{direction}-{variant}".replace(": ", "-").replace(" ", "_"): (op, direction, variant)
        for op in op_cases.table(bench, absent)
        for direction in (("forward", "backward") if op.trained else ("forward",))
        for variant in op.variants
        if (direction, variant) != ("backward", "gluon")  # which has none
    }


CASES = cases(BENCH, ABSENT)


@functools.lru_cache(maxsize=1)
def prepared(label: str, make: Callable[..., Work]) -> Work:
    """Inputs of an op, the same for all its variants."""
    torch.manual_seed(0)
    return make(BENCH, Sizes() if CUDA else SMALL)


def first_results(work: Work, variant: str, direction: str, peer: bool) -> tuple[Callable[[], Any], list[Tensor], str]:
    """What is measured and its results; of a peer that cannot do this: its error."""
    try:
        run = timed(work, variant, direction)
        return run, run(), ""
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if not peer:
            raise
        return list, [], error_line(error)


@pytest.mark.parametrize(("op", "direction", "variant"), CASES.values(), ids=CASES)
def test_op(
    benchmark: Any, record_property: Any, limits: dict[str, float], op: Op, direction: str, variant: str
) -> None:
    row: Row = {"op": op.label, "pass": direction, "variant": variant}
    work = prepared(op.label, op.make)
    try:
        with torch.set_grad_enabled(direction == "backward"):
            run, results, refused = first_results(work, variant, direction, variant in op.peers)
            if refused:
                record_property("row", row | {"refused": refused})
                benchmark.pedantic(list)  # of nothing: with --benchmark-only every test must measure
                return
            if variant != op.variants[0]:
                check_all(f"{op.label} {direction} {variant}", results, timed(work, op.variants[0], direction)())
            times = percentiles(BENCH.milliseconds(run))
            benchmark.pedantic(lambda: (run(), BENCH.sync()), rounds=3, warmup_rounds=1)
    finally:
        for x in work.inputs:
            x.requires_grad_(False)
    rate = (work.forward if direction == "forward" else work.backward) / (times[1] / 1e3)
    row |= {"baseline": variant == op.variants[0], "ms": times, "unit": op.unit, "rate": rate}
    row |= {"limit": limits[op.unit], "of_limit": rate / limits[op.unit], "goal_ms": op.goal_ms}
    row |= {"rehearsal": not CUDA, "shape": op.shape, "arch": ARCHITECTURE}
    if op.shape is not None and variant not in op.peers:
        row |= dict(zip(("impl", "num_splits"), parsed(variant)))
    benchmark.extra_info.update(row)
    record_property("row", row)


def label(row: Row) -> str:
    return f"{row['op']} {row['pass']} {row['variant']}"


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


def rate(number: float, unit: str) -> str:
    return f"{number / 1e12:.3g} TFLOP/s" if unit == "flop" else f"{number / 1e9:.4g} GB/s"


def table(rows: list[Row], red: list[str] | None = None) -> list[str]:
    """Markdown. A speedup stands only where every variant of that op and direction is right, never in a rehearsal.

    None stands while a kernel test is ``red`` (default: those :func:`failing`).
    """
    red = failing() if red is None else red
    base = {(row["op"], row["pass"]): row["ms"][1] for row in measured(rows) if row["baseline"]}
    cells, goals, failures = [], [], []
    for row in rows:
        key = (row["op"], row["pass"])
        if "ms" not in row:
            outcome = "failed" if "error" in row else "refused"
            cells.append([*key, row["variant"], outcome, "", "", ""])
            failures.append(f"- {outcome}: {label(row)}: {row['error' if 'error' in row else 'refused']}")
            continue
        compared = not red and not row["rehearsal"] and key in base and key not in wrong(rows)
        speedup = f"{base[key] / row['ms'][1]:.2f}x" if compared else ""
        figures = [report.spread(row["ms"], ".3f"), rate(row["rate"], row["unit"]), f"{row['of_limit']:.0%}"]
        cells.append([*key, row["variant"], *figures, speedup])
        if row["goal_ms"] is not None and not row["rehearsal"]:
            goals.append(f"- goal: {label(row)}: {row['ms'][1]:.3f} ms, at most {row['goal_ms']} ms")
    headings = ("op", "pass", "variant", "device ms p50 [p20, p80]", "rate", "of limit", "speedup")
    lines = [*report.table(headings, cells, 3), ""]
    lines += [f"- no speedup while {len(red)} of make gpu-test fail: {', '.join(red[:3])}"] if red else []
    return lines + goals + failures + [f"- absent: {name}: {why}" for name, why in ABSENT.items()]


def best(rows: list[Row], source: str) -> list[Measurement]:
    """The right implementations of attention at each shape, the fastest first, down to the first kernel of our own:
    that one runs without a layout too. Where it is trained, by forward and backward together.

    Args:
        source: GPU, versions, date and revision.
    """
    bad, choices = wrong(rows), []
    for shape in SHAPES:
        passes = ("forward", "backward") if shape in TRAINED else ("forward",)
        times: dict[tuple[int, str, int], dict[str, float]] = {}
        for row in measured(rows):
            if row.get("shape") == shape and "impl" in row and (row["op"], row["pass"]) not in bad:
                times.setdefault((row["arch"], row["impl"], row["num_splits"]), {})[row["pass"]] = row["ms"][1]
        total = {key: sum(by.values()) for key, by in times.items() if set(by) == set(passes)}
        for arch in sorted({key[0] for key in total}):
            ranked = sorted((ms, impl, splits) for (a, impl, splits), ms in total.items() if a == arch)
            chosen: set[str] = set()
            for ms, impl, splits in ranked:
                if impl in chosen:
                    continue
                chosen.add(impl)
                others = {impl_label(*other): round(late, 3) for late, *other in ranked if other != [impl, splits]}
                choices.append(Measurement(arch, shape, impl, splits, round(ms, 3), others, source))
                if impl == "triton":  # it takes whatever a call is made of
                    break
    return choices


def merged(new: list[Measurement], old: tuple[Measurement, ...]) -> list[dict[str, Any]]:
    """The dispatcher's table; what was measured now replaces what it held for the same architecture and shape."""
    fresh = {(row.architecture, row.shape) for row in new}
    others = [row for row in old if (row.architecture, row.shape) not in fresh]
    return [dataclasses.asdict(row) for row in sorted([*others, *new], key=lambda row: (row.architecture, row.shape))]


def write(rows: list[Row], about: dict[str, str], folder: Path) -> Path:
    """ops.md, ops.json and, from a GPU, measured.json; the path of the first.

    Args:
        about: what :func:`bench.lib.machine.environment` was when the run began.
    """
    limits = {row["unit"]: row["limit"] for row in measured(rows)}  # of the last run that measured
    reached = ", ".join(rate(limit, unit) for unit, limit in limits.items()) or "not measured"
    body = [
        "Device time by CUDA events, L2 flushed before each repetition; rates count the work that must be done, not",
        "what an implementation does. Speedups are over an op's first variant: eager, for attention torch's fused one.",
        "",
        *table(rows),
    ]
    page = report.write(
        "ops", folder, {**about, "limits": f"{reached} (a large matmul, a large copy, in the same run)"}, "Ops",
        "pytest bench/ --benchmark-only", body, {"rehearsal": not CUDA, "environment": about, "limits": limits,
        "absent": ABSENT, "rows": rows}, "" if CUDA else "at small sizes on a CPU",
    )  # fmt: skip
    if CUDA and not failing():
        versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "cudnn", "triton") if name in about)
        source = f"{about['device']}, {versions}, {about['date'][:10]}, revision {about['revision']}"
        all_rows = merged(best(rows, source), measurements())
        (folder / "measured.json").write_text(json.dumps(all_rows, indent=1) + "\n", encoding="utf-8")
    return page
