"""The op benchmarks rehearsed on the CPU: every way runs, the work is counted right, what is wrong gives no speedup."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("op_cases", "op_results", "anchors", "measure", "plain_visit")


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, imported for one test."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import op_cases
    import op_results

    yield op_cases, op_results
    for name in MODULES:
        sys.modules.pop(name, None)


def test_rehearsal(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--results", str(tmp_path)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of xdist
    environment = {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REHEARSAL at small sizes" in done.stdout
    result = json.loads((tmp_path / "ops.json").read_text())
    assert result["rehearsal"] is True
    measured = {(row["op"], row["pass"], row["way"]) for row in result["rows"]}
    for op in ("ada_layer_norm", "layer_norm", "gated_residual", "gated_residual_ada_layer_norm", "qk_norm_rope"):
        assert {(op, d, way) for d in ("forward", "backward") for way in ("eager", "compiled")} <= measured
    for op in ("qk_norm_rope_append", "flow_step", "merge_attention"):
        assert (op, "forward", "eager") in measured
    for op in ("visit", "pair", "block_causal", "constant_context", "cross"):
        assert (f"attention: {op}", "forward", "sdpa") in measured
    for row in result["rows"]:
        assert "error" not in row and row["rate"] > 0 and row["ms"] == sorted(row["ms"])
    assert any("CUDA device" in why for why in result["absent"].values()), "it is not told that triton was left out"
    page = (tmp_path / "ops.md").read_text()
    assert "REHEARSAL" in page and "x |" not in page, "a rehearsal tells no speedup"


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("visit", 3 * 6, None),  # frames of queries x frames seen
        ("pair", 3 * 6 + 3 * 6, None),  # each group its own window of 6 of the 9
        ("block_causal", 3 * 3 + 3 * 6, 2.5 * 27),
        ("constant_context", 3 * 3 + 3 * 6, 2.5 * 18 + 1.5 * 9),
    ],
)
def test_work_of_attention(bench, name, forward, backward):
    cases, results = bench
    small = cases.SMALL
    unit = 4 * small.heads * small.head_dim * (small.grid[0] * small.grid[1]) ** 2
    work = getattr(cases, name)(results.BENCH, small)
    assert work.forward == unit * forward
    assert backward is None or work.backward == unit * backward
    assert work.run("sdpa").shape == work.inputs[0].shape


def test_sizes_are_those_of_the_model(bench):
    full = bench[0].Sizes()
    assert (full.width, full.frame_tokens) == (1536, 1560)


def test_what_is_wrong_gives_no_speedup(bench, monkeypatch):
    _, results = bench
    row = {"unit": "bytes", "rate": 1e9, "of_limit": 0.5}
    rows = [
        {"op": op, "pass": "forward", "way": way, "baseline": way == "eager", "ms": [ms, ms, ms], **row}
        for op in ("good", "bad")
        for way, ms in (("eager", 2.0), ("triton", 0.5))
    ]
    rows.append({"op": "bad", "pass": "forward", "way": "compiled", "error": "off by 1"})
    monkeypatch.setattr(results, "ROWS", rows)
    monkeypatch.setattr(results, "CUDA", True)
    lines = results.table()
    assert next(line for line in lines if "good | forward | triton" in line).endswith("| 4.00x |")
    assert next(line for line in lines if "bad | forward | triton" in line).endswith("| 50% |  |")
    assert "- failed: bad forward compiled: off by 1" in lines
    monkeypatch.setattr(results, "CUDA", False)
    assert not [line for line in results.table() if "x |" in line]


def test_a_wrong_kernel_is_a_failure(bench, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    import bench_ops

    try:
        right = [torch.ones(8)]
        bench_ops.agree("op", [torch.ones(8) * 1.01], right)
        with pytest.raises(AssertionError, match="op: result 0 is off by 0.05 of the mean value, allowed 0.02"):
            bench_ops.agree("op", [torch.ones(8) * 1.05], right)
        with pytest.raises(AssertionError):
            bench_ops.agree("op", [torch.full((8,), float("nan"))], right)
    finally:
        sys.modules.pop("bench_ops")
