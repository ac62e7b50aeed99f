"""Results as a page of Markdown and the same figures as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.lib.machine import clocks
from bench.lib.measure import Bench, Case


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Lines of a Markdown table; columns after the first ``text_columns`` are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(headings) - text_columns)
    return ["| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)]


def spread(values: Sequence[float], form: str) -> str:
    """(20th, 50th, 80th percentile) as "50th [20th, 80th]"."""
    low, middle, high = (format(value, form) for value in values)
    return f"{middle} [{low}, {high}]"


def write(
    name: str, folder: Path, about: dict[str, Any], title: str, command: str, body: Iterable[str],
    result: dict[str, Any], rehearsal: str = "",
) -> Path:  # fmt: skip
    """Write NAME.md and NAME.json, each through a temporary name; the path of the first.

    Args:
        about: the environment, and what else stands as a list above the body.
        rehearsal: what was small or on a CPU, where the figures mean nothing.
    """
    warning = [f"**REHEARSAL {rehearsal}: these figures mean nothing.**", ""] if rehearsal else []
    lines = [f"# {title}: {about['device']}", "", f"`{command}`", "", *warning]
    lines += [*(f"- {key}: {value}" for key, value in about.items()), "", *body, ""]
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in ((f"{name}.md", "\n".join(lines)), (f"{name}.json", json.dumps(result, indent=1) + "\n")):
        partial = folder / f"{file}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / file)
    return folder / f"{name}.md"


def cell(case: dict[str, Any]) -> str:
    if "ms" not in case:
        return "failed" if "error" in case else "not reached"
    rate = f"{case['gb_per_s']:.0f} GB/s" if "gb_per_s" in case else f"{case['tflop_per_s']:.3g} TFLOP/s"
    part = f" ({case['of_matmul_limit']:.0%})" if "of_matmul_limit" in case else ""
    return f"{spread([case['ms'][p] for p in ('p20', 'p50', 'p80')], '.3f')} ms, {rate}{part}"


def section_table(section: dict[str, Any], across: str) -> list[str]:
    """A section of :class:`bench.lib.measure.Bench`: a column for each value of the label ``across``."""
    cases = [*section["cases"], *section["not_reached"]]
    columns = sorted({case[across] for case in cases})
    names = [name for name in section["labels"] if name != across]
    grid: dict[str, dict[Any, str]] = {}
    for case in cases:
        grid.setdefault(" ".join(str(case[k]) for k in names), {})[case[across]] = cell(case)
    rows = [[key, *(cells.get(c, "") for c in columns)] for key, cells in grid.items()]
    lines = [*table([" ".join(names), *(f"{across} {c}" for c in columns)], rows), ""]

    def label(case: dict[str, Any]) -> str:
        return " ".join(str(case[name]) for name in (*names, across))

    lines += [f"- failed: {label(case)}: {case['error']}" for case in section["cases"] if "error" in case]
    late = [f"- not reached within {section['budget_s']:.0f} s: {label(case)}" for case in section["not_reached"]]
    return lines + late


def run_sections(
    bench: Bench, plan: dict[str, tuple[Iterable[Case], str, float]], name: str, folder: Path, about: dict[str, str],
    title: str, command: str, extra: dict[str, Any], notes: Callable[[dict[str, Any]], list[str]], rehearsal: str = "",
) -> Path:  # fmt: skip
    """Measure sections and write NAME.md and NAME.json after each, so that a crash loses one; the path of the first.

    Args:
        plan: section -> its cases, the label that its table has as columns, its seconds; what it leaves over the next
            one has.
        extra: more of the JSON. notes: lines below the table of a section.
    """
    before, deadline = clocks(), time.perf_counter()
    body = [
        "Cells: p50 [p20, p80] of one launch, the rate of the work it must do, and that as part of a large matmul's."
    ]
    for section_name, (cases, across, seconds) in plan.items():
        deadline += seconds
        section = bench.section(section_name, cases, deadline - time.perf_counter())
        body += ["", f"## {section_name}", "", *section_table(section, across), *notes(section)]
        now = {"clocks before": before, "clocks after": clocks()}
        result = {"rehearsal": bool(rehearsal), "environment": about, "clocks": now, **extra}
        result |= {"matmul_limit_tflop_per_s": bench.matmul_limit, "sections": bench.sections}
        page = write(name, folder, {**about, **now}, title, command, body, result, rehearsal)
    return page
