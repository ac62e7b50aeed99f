"""bench/studies/anchors.py rehearsed on the CPU: all of it runs, nothing vanishes, a wrong merge is noticed."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch

from bench.lib.measure import Bench
from bench.lib.report import section_table
from bench.studies import anchors

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return processes.run(["-m", "bench.studies.anchors", *arguments], cwd=ROOT)


def measured(bench):
    return [case for section in bench.sections.values() for case in section["cases"] if "ms" in case]


def test_rehearsal(tmp_path):
    done = run("--device", "cpu", "--small", "--out", str(tmp_path / "result"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result" / "anchors.json").read_text())
    assert list(result["sections"]) == ["limits", "attention", "matmul", "visit"]
    assert result["rehearsal"] is True
    for key in ("device", "driver", "date", "revision", "torch", "triton", "flash-attn", "xformers"):
        assert result["environment"][key]
    for name, section in result["sections"].items():
        assert section["cases"] and not section["not_reached"], name
        for case in section["cases"]:
            assert "error" not in case, (name, case)
            assert 0 < case["ms"]["p20"] <= case["ms"]["p50"] <= case["ms"]["p80"] < math.inf
            rate = case.get("tflop_per_s", case.get("gb_per_s"))
            assert 0 < rate < math.inf
    splits = [c for c in result["sections"]["attention"]["cases"] if c["mode"] == "split"]
    assert splits and all(0 < c["error_of_merge"] < 0.02 for c in splits)
    assert {c["how"] for c in result["sections"]["visit"]["cases"]} == {"eager", "compiled"}
    assert all(": " in error for error in result["absent"].values())

    page = (tmp_path / "result" / "anchors.md").read_text()
    assert "REHEARSAL at toy sizes on cpu" in page
    for line in ("## limits", "## attention", "## matmul", "## visit", "- absent: flash-attn-2: "):
        assert line in page


def test_refuses_what_cannot_work():
    done = run("--device", "cpu")
    assert done.returncode == 2
    assert "--small" in done.stderr.splitlines()[-1]


def test_work_of_the_full_sizes():
    full = anchors.AnchorSizes()
    assert full.windows == [4680, 9360, 14040, 18720, 23400, 28080, 32760]
    assert full.forward_flop() == pytest.approx(40.41e12, rel=1e-3)  # counted by hand for 1.3B at a full window


def base_two(out, lse):
    weight = torch.softmax(lse * math.log2(math.e), dim=0).transpose(1, 2).unsqueeze(-1)
    return (out.float() * weight).sum(0, keepdim=True).to(out.dtype)


def even(out, lse):
    return out.float().mean(0, keepdim=True).to(out.dtype)


def crossed(out, lse):
    weight = torch.softmax(lse, dim=0).flip(0).transpose(1, 2).unsqueeze(-1)
    return (out.float() * weight).sum(0, keepdim=True).to(out.dtype)


@pytest.mark.parametrize("merge", [base_two, even, crossed])
def test_a_wrong_merge_is_a_failure(monkeypatch, merge):
    monkeypatch.setattr(anchors, "merge_halves", merge)
    bench = Bench("cpu", (1, 1), 0.0)
    monkeypatch.setattr(bench, "compiled", lambda function: function)
    sizes = anchors.AnchorSizes(**anchors.TOY)
    with torch.no_grad():
        cases = [c for c in anchors.attention(bench, sizes, {}) if c[0]["library"] == "sdpa-flash-cpu"]
        bench.section("attention", cases, budget=60.0)
    failed = [case["mode"] for case in bench.sections["attention"]["cases"] if "error" in case]
    assert failed == ["split"] * len(sizes.windows)
    assert len(measured(bench)) == len(sizes.windows) * len(sizes.batches)


def test_failures_and_late_cases_are_told(monkeypatch):
    def broken():
        raise ValueError("no such kernel\nsecond line")

    now = 0.0

    def slow():
        nonlocal now
        now += 10
        return {"run": lambda: torch.ones(9), "flop": 1.0}

    monkeypatch.setattr("bench.lib.measure.time", SimpleNamespace(perf_counter=lambda: now))
    bench = Bench("cpu", (1, 1), 0.0)
    bench.section("matmul", [({"m": 1}, broken), ({"m": 2}, slow), ({"m": 3}, slow)], budget=9)
    section = bench.sections["matmul"]
    assert section["cases"][0] == {"m": 1, "error": "ValueError: no such kernel"}
    assert section["not_reached"] == [{"m": 3}]
    lines = section_table(section, "m")
    assert "- failed: 1: ValueError: no such kernel" in lines
    assert "- not reached within 9 s: 3" in lines
