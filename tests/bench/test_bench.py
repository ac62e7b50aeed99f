"""The op benchmarks rehearsed on the CPU: every way runs, the work is counted right, what is wrong gives no speedup."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from any_rule import any_ring, any_rule

import hiar_kernels
from hiar_kernels import _triton
from hiar_kernels.attention.mask import visible_with_context
from hiar_kernels.attention.table import SHAPES, Measurement, read, way

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem for path in (ROOT / "bench").glob("*.py")}
# Imported first in a process, this hides what the GPU targets promise to do without.
BARE = """
import sys

HIDDEN = "av diffusers ftfy hypothesis jsonargparse matplotlib nvtx rich safetensors transformers xdist yaml"

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN.split() else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.fixture
def bench(monkeypatch):
    """bench/ on the path: its modules are imported for one test."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run_pytest(tmp_path):
    """As the GPU targets of the Makefile do, with only torch, triton, pytest and pytest-benchmark installed.

    In a copy of the tree, which nobody edits meanwhile: results are kept for one state of the sources.
    """
    tree = tmp_path / "tree"
    for folder in ("bench", "hiar_kernels", "hiar_model", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tmp_path / "sitecustomize.py").write_text(BARE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of xdist
    path = os.pathsep.join(map(str, (tmp_path, tree, tree / "bench")))
    environment |= {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-p", "resume", "--resume", "out/journal.jsonl"]

    def run(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_rehearsal(run_pytest, tmp_path):
    command = ["-p", "pytest_benchmark.plugin", "bench/bench_ops.py", "--benchmark-only", "--results", str(tmp_path)]
    said = run_pytest(*command)
    assert "REHEARSAL at small sizes" in said and "180 s of CPU, 160 of them test_two_ranks_on_two_cores" in said
    result = json.loads((tmp_path / "ops.json").read_text())
    assert result["rehearsal"] is True
    measured = {(row["op"], row["pass"], row["way"]) for row in result["rows"]}
    norms = ("ada_layer_norm", "layer_norm", "rms_norm", "gated_residual_ada_layer_norm", "gated_residual_layer_norm")
    for op in (*norms, "gated_residual", "qk_norm_rope"):
        assert {(op, d, way) for d in ("forward", "backward") for way in ("eager", "compiled")} <= measured
    for op in (
        "qk_norm_rope_append",
        "flow_step",
        "ring_advance",
        "merge_attention",
        "rms_silu_pad",
        "all pointwise of a forward",
    ):
        assert {(op, "forward", way) for way in ("eager", "compiled")} <= measured
    for op in ("visit", "pair", "block_causal", "constant_context", "cross", "bidirectional"):
        assert (f"attention: {op}", "forward", "sdpa") in measured
        named = [r for r in result["rows"] if r["shape"] == op and "impl" in r]
        keys = {(r["arch"], r["impl"], r["num_splits"]) for r in named if r["pass"] == "forward"}
        assert keys == {(0, "sdpa", 1), (0, "sdpa", 2)} if op in ("visit", "pair") else keys == {(0, "sdpa", 1)}
    for row in result["rows"]:
        assert "error" not in row and row["rate"] > 0 and row["ms"] == sorted(row["ms"])
    for name in ("triton", "cuda", "cudnn for attention"):
        assert "CUDA device" in result["absent"][name], "it is not told that our kernels were left out"
    assert "half a minute" in result["absent"]["flex with a block mask"]
    page = (tmp_path / "ops.md").read_text()
    assert "REHEARSAL" in page and not re.search(r"\dx \|", page), "a rehearsal tells no speedup"
    assert "no plot: matplotlib is not installed" in page
    assert not (tmp_path / "measured.json").exists(), "a rehearsal chooses no implementation"

    again = run_pytest(*command, "-k", "cross")
    assert "4 passed in an earlier run and do not run again" in again
    assert json.loads((tmp_path / "ops.json").read_text()) == result, "rows of earlier runs are lost"


def test_gpu_tests_need_no_more(run_pytest):
    said = run_pytest("-m", "gpu", "tests/interpreter", "tests/gpu", "--collect-only", "-q")
    assert len([line for line in said.splitlines() if "::" in line]) > 200


# The work


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("visit", 3 * 6, None),  # frames of queries x frames seen
        ("pair", 3 * 6 + 3 * 6, None),  # each group its own window of 6 of the 9
        ("block_causal", 3 * 3 + 3 * 6, 2.5 * 27),
        ("constant_context", 3 * 3 + 3 * 6, 2.5 * 18 + 1.5 * 9),
        ("bidirectional", 6 * 6, 2.5 * 36),
    ],
)
def test_work_of_attention(bench, name, forward, backward):
    import attention_cases
    from op_results import BENCH
    from work import SMALL

    unit = 4 * SMALL.heads * SMALL.head_dim * (SMALL.grid[0] * SMALL.grid[1]) ** 2
    work = getattr(attention_cases, name)(BENCH, SMALL)
    assert work.forward == unit * forward
    assert backward is None or work.backward == unit * backward
    assert work.run("sdpa").shape == work.inputs[0].shape


def test_sizes_are_those_of_the_model(bench):
    from hiar_model.config import WanConfig
    from work import Sizes

    z, model = Sizes(), WanConfig.from_name("wan2.1-t2v-1.3b")
    assert (z.width, z.frame_tokens) == (1536, 1560)
    assert (z.width, z.ffn, z.heads, z.layers) == (model.dim, model.ffn_dim, model.num_heads, model.num_layers)
    assert z.grid == model.grid(60, 104) and z.text_tokens == model.text_len and z.channels == model.in_channels


def test_pointwise_of_a_forward(bench, monkeypatch):
    """It runs the ops that the model runs, in their order, and no matmul; the compiler sees the borders."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from forward_cases import Append, forward_pointwise
    from hiar_model.config import WanConfig
    from hiar_model.models.transformer import HiARTransformer
    from op_results import BENCH
    from work import SMALL as Z

    monkeypatch.setattr(_triton, "load", lambda op, tensor: None)  # the ops run their references
    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func._schema.name)
            return func(*args, **kwargs or {})

    def ops() -> list[str]:
        found = [name for name in called if name.startswith("hiar::") and name != "hiar::attention"]
        called.clear()
        return found

    config = WanConfig(dim=Z.width, ffn_dim=Z.ffn, num_heads=Z.heads, num_layers=Z.layers, text_dim=8, text_len=8)
    model = HiARTransformer(config)
    latents = torch.randn(1, Z.block, config.in_channels, 2 * Z.grid[0], 2 * Z.grid[1])
    attend = Append(BENCH, Z, torch.randn(1, Z.block * Z.frame_tokens, Z.heads, Z.head_dim))
    work = forward_pointwise(BENCH, Z, gelu=True)
    with torch.no_grad():
        modulation, text = model.modulation(torch.zeros(1, Z.block), Z.block), model.text_kv(torch.randn(1, 8, 8))
        with Watch(), hiar_kernels.prefer("triton"):
            model.run(latents, modulation, text, attend)
        wanted = ops()
        with Watch():
            ours = work.run("triton")
        assert called.count("aten::gelu") == Z.layers
        assert not [name for name in called if "mm" in name.split("::")[1] or "attention" in name], called
        assert ops() == wanted and "hiar::qk_norm_rope_append" in wanted
        eager = work.run("eager")
        torch._dynamo.utils.counters.clear()
        compiled = work.run("compiled")
    for other in (ours, compiled):
        torch.testing.assert_close(other.float(), eager.float(), rtol=0.02, atol=0.05)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 6, "fused across a matmul"
    assert work.forward > forward_pointwise(BENCH, Z).forward


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_of_flex_attention(bench, seed):
    """Its mask_mod at every (query, key) is the rule of the kernels."""
    from torch.nn.attention.flex_attention import create_mask

    from attention_cases import mask_mod

    random = Random(seed)
    rule, _, windows, frames = any_rule(random)
    rule = dataclasses.replace(rule, frame_tokens=3, window_frames=windows[0])
    queries, own, context = (
        torch.tensor([x], dtype=torch.int32)
        for x in (random.choices(frames, k=4), any_ring(random, frames), any_ring(random, frames))
    )
    for ctx in (None, context):
        seen = rule.visible(queries, own, 1) if ctx is None else visible_with_context(rule, queries, own, ctx, 1)
        wanted = seen[0].repeat_interleave(3, 0).repeat_interleave(3, 1)
        mod = mask_mod(rule, queries[0], own[0], None if ctx is None else ctx[0])
        assert torch.equal(create_mask(mod, None, None, *wanted.shape, device="cpu")[0, 0], wanted)


@pytest.mark.parametrize("name", ["pair", "block_causal", "constant_context"])
def test_flex_attention_without_its_compiler(bench, monkeypatch, name):
    import attention_cases
    from op_results import BENCH
    from work import SMALL

    monkeypatch.setattr(BENCH, "compiled", lambda function: function)
    monkeypatch.setattr(attention_cases, "FLEX", {"flex": "AUTO"})
    with torch.no_grad():
        work = getattr(attention_cases, name)(BENCH, SMALL)
        found, wanted = work.run("flex"), work.run("sdpa")
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0.02, atol=0.02)


# The results


def row(op: str, way: str, ms: float, **more: Any) -> dict[str, Any]:
    found = {"op": op, "pass": "forward", "way": way, "baseline": way in ("eager", "sdpa"), "ms": [ms, ms, ms]}
    found |= {"unit": "bytes", "rate": 1e9, "limit": 2e9, "of_limit": 0.5, "goal_ms": None, "rehearsal": False}
    return found | more


def test_what_is_wrong_gives_no_speedup(bench):
    from op_results import table

    rows = [row(op, way, ms) for op in ("good", "bad") for way, ms in (("eager", 2.0), ("triton", 0.5))]
    rows.append({"op": "bad", "pass": "forward", "way": "compiled", "error": "off by 1"})
    rows.append({"op": "good", "pass": "forward", "way": "flex", "refused": "no backward"})
    lines = table(rows)
    assert next(line for line in lines if "good | forward | triton" in line).endswith("| 4.00x |")
    assert next(line for line in lines if "bad | forward | triton" in line).endswith("| 50% |  |")
    assert "- failed: bad forward compiled: off by 1" in lines
    assert "- refused: good forward flex: no backward" in lines
    assert not [line for line in table([{**r, "rehearsal": True} for r in rows]) if re.search(r"\dx \|", line)]


def test_a_goal_is_told(bench):
    from op_results import table

    line = "- goal: all forward triton: 2.100 ms, wanted at most 2.5 ms"
    assert line in table([row("all", "triton", 2.1, goal_ms=2.5)])
    assert line not in table([row("all", "triton", 2.1, goal_ms=2.5, rehearsal=True)])


def test_the_choices_of_the_dispatcher(bench, tmp_path):
    from op_results import best, merged

    def attention(shape: str, impl: str, ms: float, num_splits: int = 1, **more: Any) -> dict[str, Any]:
        named = {"shape": shape, "impl": impl, "num_splits": num_splits, "arch": 90}
        return row(f"attention: {shape}", way(impl, num_splits), ms, **named, **more)

    rows = [attention("visit", "sdpa", 3.0), attention("visit", "cudnn", 2.5), attention("visit", "cudnn", 2.0, 2)]
    rows += [attention("visit", "triton", 2.2), row("attention: visit", "flex", 1.0, shape="visit", arch=90)]
    for impl, forward, backward in (("sdpa", 1.0, 9.0), ("triton", 2.0, 5.0)):
        rows.append(attention("block_causal", impl, forward))
        rows.append(attention("block_causal", impl, backward, **{"pass": "backward"}))
    rows.append(attention("bidirectional", "flash", 1.0))  # no backward: not for training
    rows += [
        attention("cross", "sdpa", 1.0),
        {"op": "attention: cross", "pass": "forward", "way": "triton", "error": "x"},
    ]
    found = best(rows, "H200, today")
    twice, uncut = "cudnn with num_splits=2", {"cudnn": 2.5, "sdpa": 3.0}
    assert found == [
        Measurement(90, "visit", "cudnn", 2, 2.0, {"triton": 2.2, **uncut}, "H200, today"),
        Measurement(90, "visit", "triton", 1, 2.2, {twice: 2.0, **uncut}, "H200, today"),  # where ids are on the device
        Measurement(90, "block_causal", "triton", 1, 7.0, {"sdpa": 10.0}, "H200, today"),
    ]
    old = [Measurement(arch, "visit", "flash", 1, 4.0, {}, "before") for arch in (90, 80)]
    (tmp_path / "measured.json").write_text(json.dumps(merged(found, tuple(old))))
    kept = read(tmp_path / "measured.json")
    assert [(m.architecture, m.shape, m.impl) for m in kept] == [
        (80, "visit", "flash"), (90, "block_causal", "triton"), (90, "visit", "cudnn"), (90, "visit", "triton")
    ]  # fmt: skip
    assert {m.shape for m in kept} <= set(SHAPES)


def test_a_plot_beside_the_table(bench, tmp_path, monkeypatch):
    import op_results

    about = {"device": "a GPU", "date": "2026-01-01T00:00:00Z", "revision": "abc", "torch": "2"}
    rows = [row(op, way, 1.0) for op in ("one", "two") for way in ("eager", "triton")]
    page = op_results.write(rows, about, tmp_path)
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    assert "![part of the limit](ops.png)" in page.read_text() and "limits: 2 GB/s" in page.read_text()
    assert "no plot: nothing was measured" in op_results.plot([], "", tmp_path / "none.png")


def test_a_wrong_kernel_is_a_failure(bench, monkeypatch):
    import bench_ops
    from work import Work

    right = [torch.ones(8)]
    bench_ops.agree("op", [torch.ones(8) * 1.01], right)
    with pytest.raises(AssertionError, match="op: result 0 is off by 0.05 of the mean value, allowed 0.02"):
        bench_ops.agree("op", [torch.ones(8) * 1.05], right)
    with pytest.raises(AssertionError):
        bench_ops.agree("op", [torch.full((8,), float("nan"))], right)

    def broken(way: str) -> torch.Tensor:
        raise RuntimeError(f"{way} cannot\nsecond line")

    assert bench_ops.first_results(Work([], broken, 1.0), "flex", "forward", True)[2] == "RuntimeError: flex cannot"
    with pytest.raises(RuntimeError, match="triton cannot"):
        bench_ops.first_results(Work([], broken, 1.0), "triton", "forward", False)


def test_no_speedup_while_a_kernel_test_is_red(bench, tmp_path):
    import op_results
    from resume import sources

    def journal(**outcomes: str):
        lines = [{"sources": sources(op_results.ROOT)}, *({"test": t, "outcome": o} for t, o in outcomes.items())]
        file = tmp_path / "gpu-test.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return op_results.failing(file)

    rows = [row("one", "eager", 2.0), row("one", "triton", 1.0)]
    assert journal(one="passed") == op_results.failing(tmp_path / "none") == []
    assert any("2.00x" in line for line in op_results.table(rows, []))
    red = journal(one="passed", two="failed")
    assert red == ["two"]
    lines = op_results.table(rows, red)
    assert not any("x |" in line for line in lines) and "- no speedup is told, 1 of make gpu-test fail: two" in lines
    file = tmp_path / "gpu-test.jsonl"
    file.write_text(file.read_text().replace(sources(op_results.ROOT), "other sources"))
    assert op_results.failing(file) == []
