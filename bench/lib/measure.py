"""Timing on one device, and series of cases with a time budget. Needs torch alone.

What fails is recorded with its error, what a section's seconds did not reach is listed: nothing vanishes from a result.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bench.lib.machine import CUDA, error_line

# The labels of a case, the same names throughout a section, and a function that prepares and checks it and returns
# {"run": what is timed, "flop": its work or "bytes": its traffic, any notes}.
Case = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
PERCENTILES = (20, 50, 80)
TOLERANCE = 0.02  # mean |difference| / mean |value|: bfloat16 rounding stays below 0.006, a wrong scale or LSE does not


class Bench:
    """Times cases on one device: CUDA events, L2 flushed before every repetition; a plain clock on the CPU.

    triton.testing.do_bench flushes too, but lets the host launch on the clock (up to hundreds of kernels a call here)
    and does not run on a CPU.
    """

    def __init__(self, device: str, repetitions: tuple[int, int], case_seconds: float):
        self.device, self.cuda = device, device == "cuda"
        self.repetitions, self.case_seconds = repetitions, case_seconds
        self.sections: dict[str, dict[str, Any]] = {}
        self.matmul_limit: float | None = None  # TFLOP/s; once known, rates are given as parts of it
        self.flush = torch.empty(64 << 20 if self.cuda else 1, dtype=torch.int32, device=device)  # larger than any L2

    def compiled(self, function: Callable) -> Callable:
        """torch.compile; on a CPU, where only the path is rehearsed, without the code generator."""
        return torch.compile(function, dynamic=False, backend="inductor" if self.cuda else "eager")

    def normal(self, *shape: int, scale: Tensor | float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(torch.bfloat16)

    def sync(self) -> float:
        """time.perf_counter() after the device has finished."""
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
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in events:
            self.flush.zero_()
            torch.cuda._sleep(1_000_000)  # half a millisecond in which the host gets ahead: launching is not counted
            begin.record()
            run()
            end.record()
        self.sync()
        return sorted(begin.elapsed_time(end) for begin, end in events)

    def measure(self, prepare: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        case = prepare()
        run, flop, moved = case.pop("run"), case.pop("flop", None), case.pop("bytes", None)
        run()
        case["first_result_s"] = self.sync() - started  # compilation and checks included
        times = self.milliseconds(run)
        case["repetitions"] = len(times)
        case["ms"] = {f"p{p}": value for p, value in zip(PERCENTILES, percentiles(times))}
        seconds = case["ms"]["p50"] / 1e3
        if moved is not None:
            case["gb_per_s"] = moved / seconds / 1e9
        if flop is not None:
            case["tflop_per_s"] = flop / seconds / 1e12
            if self.matmul_limit is not None:
                case["of_matmul_limit"] = case["tflop_per_s"] / self.matmul_limit
        return case

    def section(self, name: str, cases: Iterable[Case], budget: float) -> dict[str, Any]:
        """Measure cases until `budget` seconds have passed; a case once begun is finished."""
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
                done.append({**labels, "error": error_line(error)})
                print(f"  {name} {labels}: {error_line(error)}", file=sys.stderr)
        section["seconds"] = time.perf_counter() - begun
        print(f"{name}: {len(done)} cases, {len(late)} not reached, {section['seconds']:.1f} s", flush=True)
        if self.cuda:
            torch.cuda.empty_cache()
        return section


@functools.cache
def default_bench() -> Bench:
    """What the pytest benchmarks share: the GPU, or a CPU, which only rehearses."""
    return Bench("cuda", (8, 40), 0.3) if CUDA else Bench("cpu", (3, 3), 0.0)


def percentiles(times: list[float]) -> list[float]:
    """The 20th, 50th and 80th of sorted times."""
    return [times[round(p / 100 * (len(times) - 1))] for p in PERCENTILES]


def check(what: str, got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> float:
    """Mean |difference| / mean |value|; RuntimeError where that is above the tolerance, or NaN."""
    error = ((got.float() - expected.float()).abs().mean() / expected.float().abs().mean()).item()
    if not error <= tolerance:
        raise RuntimeError(f"{what} is off by {error:.3g} of the mean value, allowed {tolerance}")
    return error


def check_all(what: str, results: list[Tensor], expected: list[Tensor]) -> None:
    for i, (got, right) in enumerate(zip(results, expected, strict=True)):
        check(f"{what}: result {i}", got, right)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """A function as a replay of one CUDA graph; its result lies in the same memory every time."""
    for _ in range(2):  # compiles and loads what capture may not
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def large_matmul(bench: Bench, n: int) -> dict[str, Any]:
    a, b = bench.normal(n, n), bench.normal(n, n)
    return {"run": lambda: a @ b, "flop": 2.0 * n**3}


def large_copy(bench: Bench, mib: int) -> dict[str, Any]:
    a, b = (torch.zeros(mib << 20, dtype=torch.uint8, device=bench.device) for _ in range(2))
    return {"run": lambda: b.copy_(a), "bytes": 2.0 * a.nbytes}
