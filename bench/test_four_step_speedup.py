"""Four steps on several ranks against one: measured, beside what the simulator says.

    pytest bench/test_four_step_speedup.py --benchmark-only

On a CPU: 2 ranks on 2 cores against one rank on one core, with visits of at least 50 ms: a check that ranks overlap and
that the simulator predicts them, no more; 160 s of CPU by two processes, and each way tells when it is done. On one
GPU: one rank is measured, pipelines are projected from its visits. On four: all is measured. The table is printed and
goes to out/bench/four_step_<setting>.{md,json}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hiar_model.schedule.report import measured_table

ROOT = Path(__file__).resolve().parents[1]
LEAST_VISIT = 0.05  # seconds
Job = Callable[[str, int], list[dict[str, Any]]]
PREDICTED = 0.1  # the simulator may be off by so much of the time


@pytest.fixture
def job(benchmark: Any, capfd: pytest.CaptureFixture[str]) -> Job:
    def run(setting: str, processes: int) -> list[dict[str, Any]]:
        with capfd.disabled():  # it takes minutes: what it says of its progress is not kept back
            return measured(benchmark, setting, processes)

    return run


def measured(benchmark: Any, setting: str, processes: int) -> list[dict[str, Any]]:
    """Run four_step.py in so many processes; its rows, which are printed too."""
    target = ROOT / "out" / "bench" / f"four_step_{setting}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(Path(__file__).with_name("four_step.py")), str(target), setting]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    print(f"\n{' '.join(command[3:])}:", flush=True)
    done = benchmark.pedantic(lambda: subprocess.run(command, env=environment), rounds=1)
    assert done.returncode == 0, "its own lines above say why"
    found = json.loads(target.read_text())
    lines = measured_table(found)
    target.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("", *lines, sep="\n")
    benchmark.extra_info["rows"] = found["rows"]
    return found["rows"]


def by_way(rows: list[dict[str, Any]], blocks: int) -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(row["order"], row["way"], row["ranks"]): row for row in rows if row["blocks"] == blocks}


def assert_predicted(rows: list[dict[str, Any]]) -> None:
    for row in (row for row in rows if row["measured"] and row["predicted"] is not None):
        off = row["predicted"] / row["seconds"] - 1
        assert abs(off) <= PREDICTED, f"the simulator is off by {off:+.1%}: {row}"


def test_two_ranks_on_two_cores(job: Job) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        pytest.skip(f"needs 2 cores, here is {cores}")
    rows = job("cpu", 2)
    found = json.loads((ROOT / "out" / "bench" / "four_step_cpu.json").read_text())["environment"]["visit_s"]
    assert min(seconds for kind in ("denoise", "cache") for _, seconds in found[kind]["points"]) >= LEAST_VISIT
    ways = by_way(rows, 16)
    one, two = ways["stream", "alone", 1]["seconds"], ways["stream", "pipeline", 2]["seconds"]
    assert one / two > 1.5, f"ranks do not overlap: {one:.2f} s on one, {two:.2f} s on two"
    assert_predicted(rows)


def test_one_gpu(job: Job) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, here is none")
    assert_predicted(job("cuda", 1))


def test_four_gpus(job: Job) -> None:
    count = torch.cuda.device_count()
    if count < 4:
        pytest.skip(f"needs 4 CUDA devices, here are {count}; test_one_gpu projects what they would take")
    rows = job("cuda", 4)
    assert_predicted(rows)
    ways = by_way(rows, 27)
    speedup = ways["block_first", "alone", 1]["seconds"] / ways["stream", "pipeline", 4]["seconds"]
    assert speedup >= 2.2, f"4 ranks are {speedup:.2f} times as fast as block-first on one: 2.2 is the goal, 2.39 ideal"
