"""Four steps on several ranks against one: measured, beside what the simulator says.

On a CPU: 2 ranks on 2 cores, with tasks of at least 50 ms: a check that ranks overlap and that the simulator predicts
them, no more; 160 s of CPU by two processes. On one GPU: one rank is measured, pipelines are projected from its tasks.
On four: all is measured. The table is printed and goes to out/bench/four_step_<setting>.{md,json}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.lib.machine import ROOT
from bench.studies.parallel import measured_table

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
GPUS = torch.cuda.device_count()
LEAST_TASK = 0.05  # seconds
PREDICTED = 0.1  # the simulator may be off by so much of the time
Job = Callable[[str, int], dict[str, Any]]


@pytest.fixture
def job(benchmark: Any, capfd: pytest.CaptureFixture[str]) -> Job:
    """Run four_step.py in so many processes; its result, with the table printed."""

    def run(setting: str, processes: int) -> dict[str, Any]:
        target = ROOT / "out" / "bench" / f"four_step_{setting}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "bench.rollout.four_step", str(target), setting]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        with capfd.disabled():  # it takes minutes: its progress is shown
            print(f"\n{' '.join(command[3:])}:", flush=True)
            done = benchmark.pedantic(lambda: subprocess.run(command, env=environment), rounds=1)
            assert done.returncode == 0, "its own lines above say why"
            result = json.loads(target.read_text())
            lines = measured_table(result)
            print("", *lines, sep="\n")
        target.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        benchmark.extra_info["rows"] = result["rows"]
        return result

    return run


def by_strategy(rows: list[dict[str, Any]], blocks: int) -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(row["order"], row["way"], row["ranks"]): row for row in rows if row["blocks"] == blocks}


def assert_predicted(rows: list[dict[str, Any]]) -> None:
    for row in (row for row in rows if row["measured"] and row["predicted"] is not None):
        off = row["predicted"] / row["seconds"] - 1
        assert abs(off) <= PREDICTED, f"the simulator is off by {off:+.1%}: {row}"


@pytest.mark.skipif(CORES < 2, reason=f"needs 2 cores, here is {CORES}")
def test_two_ranks_on_two_cores(job: Job) -> None:
    result = job("cpu", 2)
    times = result["environment"]["visit_s"]
    assert min(seconds for kind in ("denoise", "cache") for _, seconds in times[kind]["points"]) >= LEAST_TASK
    strategies = by_strategy(result["rows"], 16)
    one, two = strategies["stream", "alone", 1]["seconds"], strategies["stream", "pipeline", 2]["seconds"]
    assert one / two > 1.5, f"ranks do not overlap: {one:.2f} s on one, {two:.2f} s on two"
    assert_predicted(result["rows"])


@pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device, here is none")
def test_one_gpu(job: Job) -> None:
    assert_predicted(job("cuda", 1)["rows"])


@pytest.mark.skipif(
    GPUS < 4, reason=f"needs 4 CUDA devices, here are {GPUS}: test_one_gpu projects what they would take"
)
def test_four_gpus(job: Job) -> None:
    rows = job("cuda", 4)["rows"]
    assert_predicted(rows)
    strategies = by_strategy(rows, 27)
    speedup = strategies["block_first", "alone", 1]["seconds"] / strategies["stream", "pipeline", 4]["seconds"]
    assert speedup >= 2.2, f"4 ranks are {speedup:.2f} times as fast as block-first on one: 2.2 is the goal, 2.39 ideal"
