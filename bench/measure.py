"""Measuring and writing down: cases, time budgets, percentiles, the machine, a table. Needs torch alone.

A section is a series of cases. What fails is recorded with its error, what the section's seconds did not reach is
listed: nothing that was asked for vanishes from a result.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

# The labels of a case, the same names throughout a section, and a function that prepares and checks it and returns
# {"run": what is timed, "flop": its work or "bytes": its traffic, any notes}.
Case = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
PERCENTILES = (20, 50, 80)
SOURCES = {".py", ".cu", ".cuh", ".cpp", ".h", ".toml", ".json", ".safetensors"}
NOT_SOURCES = {"build", "dist", "out", "runs", "results", "__pycache__"}
PEERS = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers")


def line_of(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class Bench:
    """Times cases on one device: CUDA events, L2 flushed before every repetition; a plain clock on the CPU."""

    def __init__(self, device: str, repetitions: tuple[int, int], case_seconds: float):
        self.device, self.cuda = device, device == "cuda"
        self.repetitions, self.case_seconds = repetitions, case_seconds
        self.sections: dict[str, dict[str, Any]] = {}
        self.matmul_limit: float | None = None  # TFLOP/s; once known, rates are given as parts of it
        self.flush = torch.empty(64 << 20 if self.cuda else 1, dtype=torch.int32, device=device)  # larger than any L2

    def compiled(self, function: Callable) -> Callable:
        """torch.compile; on a CPU, where only the path is rehearsed, without the code generator."""
        return torch.compile(function, dynamic=False, backend="inductor" if self.cuda else "aot_eager")

    def sync(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def milliseconds(self, run: Callable[[], Any]) -> list[float]:
        """Of each repetition, sorted: as many as fit `case_seconds`, within the bounds of `repetitions`."""
        run()
        start = self.sync()
        run()
        low, high = self.repetitions
        count = int(min(max(self.case_seconds / (self.sync() - start), low), high))
        if not self.cuda:
            clock = [(time.perf_counter(), run(), time.perf_counter()) for _ in range(count)]
            return sorted((end - begin) * 1e3 for begin, _, end in clock)
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in pairs:
            self.flush.zero_()
            torch.cuda._sleep(1_000_000)  # half a millisecond in which the host gets ahead: launching is not counted
            begin.record()
            run()
            end.record()
        self.sync()
        return sorted(begin.elapsed_time(end) for begin, end in pairs)

    def measure(self, prepare: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        case = prepare()
        run, flop, moved = case.pop("run"), case.pop("flop", None), case.pop("bytes", None)
        run()
        case["first_result_s"] = self.sync() - started  # compilation and checks included
        taken = self.milliseconds(run)
        case["repetitions"] = len(taken)
        case["ms"] = {f"p{p}": taken[round(p / 100 * (len(taken) - 1))] for p in PERCENTILES}
        seconds = case["ms"]["p50"] / 1e3
        if moved is not None:
            case["gb_per_s"] = moved / seconds / 1e9
        if flop is not None:
            case["tflop_per_s"] = flop / seconds / 1e12
            if self.matmul_limit is not None:
                case["of_matmul_limit"] = case["tflop_per_s"] / self.matmul_limit
        return case

    def section(self, name: str, cases: Iterable[Case], budget: float) -> None:
        """Measures cases until `budget` seconds have passed; a case once begun is finished."""
        done: list[dict[str, Any]] = []
        late: list[dict[str, Any]] = []
        section: dict[str, Any] = {"budget_s": budget, "labels": [], "cases": done, "not_reached": late}
        self.sections[name] = section
        begun = time.perf_counter()
        for labels, prepare in cases:
            section["labels"] = list(labels)
            if time.perf_counter() - begun > budget:
                late.append(labels)
                continue
            try:
                done.append({**labels, **self.measure(prepare)})
            except Exception as error:  # recorded; the run goes on
                done.append({**labels, "error": line_of(error)})
                print(f"  {name} {labels}: {line_of(error)}", file=sys.stderr)
        section["seconds"] = time.perf_counter() - begun
        print(f"{name}: {len(done)} cases, {len(late)} not reached, {section['seconds']:.1f} s", flush=True)
        if self.cuda:
            torch.cuda.empty_cache()


def told(*command: str) -> str:
    """What a command says, or why it says nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({line_of(error)})"
    return done.stdout.strip() if done.returncode == 0 else f"unknown ({done.stderr.strip()[:100]})"


def clocks() -> str:
    asked = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    return told("nvidia-smi", f"--query-gpu={asked}", "--format=csv").replace("\n", ": ")


def environment(device: str) -> dict[str, str]:
    """Device, driver, date, git revision ("unknown" outside a repository) and versions."""
    cuda = device == "cuda"
    revision = told("git", "rev-parse", "--short=10", "HEAD").partition(" ")[0]
    here = (":/", ":(top,exclude)bench/results")  # a result does not change what the next one is of
    if revision != "unknown" and told("git", "status", "--porcelain", "--", *here):
        revision += "-dirty"
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
        "driver": told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "none",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": revision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "none",
        **{name: installed.get(name, "absent") for name in PEERS},
    }


def sources(root: Path) -> str:
    """A digest of every source file under a folder, committed or not; hidden and generated folders are left out."""
    digest = hashlib.sha256()
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(d for d in inside if d[0] != "." and d not in NOT_SOURCES and not d.endswith(".egg-info"))
        for file in sorted(Path(folder, name) for name in files if Path(name).suffix in SOURCES):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


def result_folder(about: dict[str, str]) -> Path:
    """bench/results/<device>/<date>-<revision> of an :func:`environment`."""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return Path(__file__).resolve().parent / "results" / device / f"{about['date'][:10]}-{about['revision']}"


def cell(case: dict[str, Any]) -> str:
    if "ms" not in case:
        return "failed" if "error" in case else "not reached"
    rate = f"{case['gb_per_s']:.0f} GB/s" if "gb_per_s" in case else f"{case['tflop_per_s']:.3g} TFLOP/s"
    part = f" ({case['of_matmul_limit']:.0%})" if "of_matmul_limit" in case else ""
    return f"{case['ms']['p50']:.3f} [{case['ms']['p20']:.3f}, {case['ms']['p80']:.3f}] ms, {rate}{part}"


def table(section: dict[str, Any], across: str) -> list[str]:
    """Markdown lines of a section: one column for each value of the label `across`, one row for each of the others."""
    cases = [*section["cases"], *section["not_reached"]]
    columns = sorted({case[across] for case in cases})
    names = [name for name in section["labels"] if name != across]
    grid: dict[tuple[str, ...], dict[Any, str]] = {}
    for case in cases:
        grid.setdefault(tuple(str(case[k]) for k in names), {})[case[across]] = cell(case)
    rows = [[" ".join(names), *(f"{across} {c}" for c in columns)], ["---"] * (len(columns) + 1)]
    rows += [[" ".join(key), *(found.get(c, "") for c in columns)] for key, found in grid.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows] + [""]

    def named(case: dict[str, Any]) -> str:
        return " ".join(str(case[name]) for name in (*names, across))

    lines += [f"- failed: {named(case)}: {case['error']}" for case in section["cases"] if "error" in case]
    late = [f"- not reached within {section['budget_s']:.0f} s: {named(case)}" for case in section["not_reached"]]
    return lines + late
