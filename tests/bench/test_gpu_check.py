"""bench/gpu_check.py: what it names exists, its parts fit their time, and a step that hangs is stopped."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_check
from bench.gpu_check import ROOT, SECONDS, Check, Step, chosen_ops, left_out
from bench.ops import attention_cases, bench_ops
from bench.rollout import ab
from hiar_kernels.attention import gluon
from hiar_kernels.common import cuda_loader
from hiar_model.benchmark.setting import Setting
from hiar_model.config import ExecutionConfig

pytestmark = pytest.mark.cpu


@pytest.fixture
def on_hopper(monkeypatch) -> list[str]:
    """Names of the tests of bench/ops on a Hopper GPU with all kernels."""
    for owner, name in ((gluon, "unavailable"), (attention_cases, "unavailable"), (cuda_loader, "missing")):
        monkeypatch.setattr(owner, name, lambda *_: None)
    monkeypatch.setattr(cuda_loader, "status", lambda: "built")
    libraries = dict.fromkeys(("sdpa-flash", "sdpa-efficient", "flex"))
    monkeypatch.setattr(attention_cases, "available", lambda *_, **__: libraries)
    return list(bench_ops.cases(types.SimpleNamespace(cuda=True, device="cuda"), {}))  # type: ignore[arg-type]


def ids_of(test: Any) -> set[str]:
    """What pytest names the cases of a parametrised test."""
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    each = [[str(mark.kwargs.get("ids", str)(value)) for value in mark.args[1]] for mark in marks]
    return {"-".join(names) for names in itertools.product(*each)}


def test_the_tests_that_it_names_are_there():
    path = ROOT / gpu_check.FP8
    spec = importlib.util.spec_from_file_location("fp8_on_the_device", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    named = [test for variant in gpu_check.VARIANTS for test in gpu_check.of_variant(variant)]
    prefix = f"{gpu_check.FP8}::test_variants_and_the_logsumexp"
    assert {f"{prefix}[{name}]" for name in ids_of(module.test_variants_and_the_logsumexp)} == set(named)
    assert next(iter(module.CASES)) == gpu_check.CASES[0], "the smallest does not come first"


def test_the_measurements_that_it_names_are_there(on_hopper):
    tests = {f"bench/ops/bench_ops.py::test_op[{name}]" for name in on_hopper}
    named = [name for name in left_out(gpu_check.VARIANTS) if name.startswith("bench/")]
    assert set(named) <= tests and {name for name in tests if "gluon" in name and "fp8" in name} == set(named)
    for op in gpu_check.OPS:
        assert any(op in name for name in on_hopper), op
    for peer in gpu_check.PEERS:
        assert any(peer in name for name in on_hopper), peer
    chosen = [name for name in on_hopper if any(op in name for op in gpu_check.OPS)]
    chosen = [name for name in chosen if not any(peer.lower() in name.lower() for peer in gpu_check.PEERS)]
    assert "all_pointwise_of_a_forward-forward-triton" in chosen
    assert {f"attention-{shape}-forward-gluon" for shape in ("visit", "pair")} < set(chosen)
    assert chosen.index("attention_fp8-task-forward-gluon") < chosen.index("attention-visit-forward-gluon")
    assert len(chosen) < 35  # at a second or two each


def test_orders_and_precisions():
    assert set(gpu_check.ORDERS) < set(ab.ORDERS)
    for options in gpu_check.PRECISIONS.values():
        Setting("wan2.1-t2v-1.3b", **options)
        ExecutionConfig(**options)


def test_the_parts_fit_their_time():
    parts = [("build", *gpu_check.DEFAULT), ("build", "tests", "ops", "rollouts"), ("precisions", "decoder")]
    sums = [sum(SECONDS[part] for part in each) for each in parts]
    assert sums[0] <= 420 and sums[1] <= 360
    assert gpu_check.__doc__ is not None
    assert [int(n) for n in re.findall(r"python -m .* (\d+) s$", gpu_check.__doc__, re.M)] == sums


def test_what_failed_is_neither_tested_nor_measured(monkeypatch, tmp_path):
    """The variants' processes are told apart; the tests that follow leave out what did not pass."""
    steps: list[Step] = []

    def start(step: Step, out: Path) -> Step:
        steps.append(step)
        return step

    monkeypatch.setattr(Step, "start", start)
    monkeypatch.setattr(Step, "finish", lambda step: int(step.name in ("variant-0", "variant-2")))
    check = Check(tmp_path, tmp_path, rehearsal=False)
    for part in gpu_check.DEFAULT:
        getattr(check, part)()
    assert check.failed == ["pinned", "wide tails"] and check.wrong == 2
    by_name = {step.name: list(step.words) for step in steps}
    for name in ("tests", "ops"):
        words = by_name[name]
        deselected = [words[i + 1] for i, word in enumerate(words) if word == "--deselect"]
        assert deselected == left_out(check.failed) and gpu_check.FP8 in deselected
    assert chosen_ops(False) in by_name["ops"] and by_name["rollouts"][:2] == ["-m", "bench.rollout.ab"]


@pytest.mark.parametrize("deaf", [False, True])
def test_a_step_that_hangs_is_stopped(deaf, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "PATIENCE", 0.5)
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);" if deaf else ""
    code = f"{ignore}import time; print('FAILED one', flush=True); time.sleep(60)"
    step = Step("slow", 60, ["-c", code]).start(tmp_path)
    assert step.process is not None
    while "FAILED one" not in step.log.read_text():  # a busy machine starts it late
        assert step.process.poll() is None
        time.sleep(0.01)
    step.seconds = 0
    assert step.finish() == 124
    assert step.process.wait(30) < 0 or not deaf
    printed = capsys.readouterr().out
    assert "== slow: exit status 124" in printed and "FAILED one" in printed


def test_a_step_that_fails_shows_its_end(tmp_path, capsys):
    assert Step("bad", 20, ["-c", "raise SystemExit('no such thing')"]).start(tmp_path).finish() == 1
    assert "no such thing" in capsys.readouterr().out


def test_before_must_be_a_revision(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="BEFORE must be a folder with a revision of the project, got "):
        gpu_check.main()
    assert not (tmp_path / "out").exists()
