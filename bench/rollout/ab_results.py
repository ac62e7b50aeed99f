"""The results of bench/rollout/ab.py: figures of two revisions, their ratio and its spread over the pairs."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from bench.lib import report
from hiar_model.benchmark.parts import KINDS, LAUNCHES, SYNCS, covered, kind_of

Row = dict[str, Any]
UNITS = {
    "task_ms": "ms a task", "fps": "fps without VAE", "peak_gib": "peak GiB", "ms": "ms",
    "cpu_s": "CPU s", "wall_s": "wall s", "rss_mib": "peak MiB",
    **{kind: f"{kind}, ms a task" for kind in (*KINDS, "idle")},
    "launches": "launches a task", "syncs": "host syncs a task",
    "device_ops": "device operations a task", "device_ops_layer": "device operations a layer and forward",
}  # fmt: skip


def parts(trace: dict[str, Any], cuda: bool) -> dict[str, float | None]:
    """Of one traced block, in milliseconds a task: the kinds of work, and the time in which the device had any."""
    result: dict[str, float | None] = dict.fromkeys(KINDS, 0.0)
    tasks, operations = trace["tasks"], 0
    for name, seconds, count in trace["device"]:
        kind = kind_of(name)
        result[kind] = (result[kind] or 0.0) + 1e3 * seconds / tasks
        operations += count
    result["busy"] = covered(trace["spans"]) / 1e3 / tasks if cuda else sum(result[kind] or 0.0 for kind in KINDS)
    host = trace["host"]
    result["launches"] = sum(n for name, n in host.items() if LAUNCHES.match(name)) / tasks if cuda else None
    result["syncs"] = sum(host.get(name, 0) for name in SYNCS) / tasks if cuda else None
    result["device_ops"] = operations / tasks if cuda else None
    forwards = trace["forwards"]
    result["device_ops_layer"] = operations / forwards / trace["layers"] if cuda and forwards else None
    return result


def figures(row: Row) -> dict[str, dict[str, list[float]]]:
    """Figure -> side -> values; those that both sides have. Idle is what the clock saw beyond the traced work."""
    values: dict[str, dict[str, list[float]]] = {}
    for side, samples in row["samples"].items():
        traces = row.get("traces", {}).get(side, [])
        if traces:
            task_ms = median(sample["task_ms"] for sample in samples)
            traces = [{**trace, "idle": max(0.0, task_ms - trace["busy"])} for trace in traces]
        for name in UNITS:
            present = [s[name] for s in (*samples, *traces) if s.get(name) is not None]
            if present:
                values.setdefault(name, {})[side] = present
    return {name: sides for name, sides in values.items() if len(sides) == 2}


def compared(a: list[float], b: list[float]) -> dict[str, Any]:
    """Median, least and largest of each side; A / B of the medians, and its least and largest over the pairs."""
    ratios = [x / y for x, y in zip(a, b) if y]
    return {
        "a": [median(a), min(a), max(a)],
        "b": [median(b), min(b), max(b)],
        "ratio": median(a) / median(b) if median(b) else None,
        "pairs": [min(ratios), max(ratios)] if len(ratios) > 1 else None,
    }


def short(sample: dict[str, float | None]) -> str:
    name = next(iter(sample))
    return f"{sample[name]:.4g} {UNITS[name]}"


def _cell(values: list[float]) -> str:
    middle, low, high = (f"{value:.4g}" for value in values)
    return middle if low == high else f"{middle} [{low}, {high}]"


def table(rows: list[Row]) -> list[str]:
    """Markdown, one line for each case and figure."""
    cells = []
    for row in (row for row in rows if "error" not in row):
        for name, sides in figures(row).items():
            c = compared(sides["A"], sides["B"])
            ratio = "" if c["ratio"] is None else f"{c['ratio']:.3f}"
            spread = "" if c["pairs"] is None else "{:.3f} to {:.3f}".format(*c["pairs"])
            cells.append([row["label"].replace("|", "\\|"), UNITS[name], _cell(c["a"]), _cell(c["b"]), ratio, spread])
    headings = ("case", "figure", "A: median [min, max]", "B: median [min, max]", "A / B", "of the pairs")
    lines = [*report.table(headings, cells, 2), ""]
    lines += [f"- failed: {row['label']}: {row['error']}" for row in rows if "error" in row]
    return lines + [f"- cut short: {row['label']}: {row['cut']}" for row in rows if "cut" in row]


def write(result: dict[str, Any], folder: Path) -> Path:
    """ab.md and ab.json; the path of the first."""
    about = {name: ", ".join(f"{key} {value}" for key, value in side.items()) for name, side in result["sides"].items()}
    about |= {key: value for key, value in result["environment"].items() if key != "revision"}
    body = [
        "Measured in turn, ABAB..., each revision in a process of its own. A / B is that of the medians: above 1, B",
        "takes less (of fps: below 1, B makes more). A task is one forward of one block.",
        "Attention, matmul and the other parts are of one traced block, idle is the rest of the clock's time.",
        "",
        *table(result["rows"]),
    ]
    rehearsal = "at toy sizes on a CPU" if result["rehearsal"] else ""
    return report.write("ab", folder, about, "A and B in turn", result["command"], body, result, rehearsal)
