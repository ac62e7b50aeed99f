"""The op benchmarks rehearsed on the CPU: every way runs, the work is counted right, what is wrong gives no speedup."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from random import Random
from typing import Any

import pytest
import torch
from any_rule import any_ring, any_rule

import hiar_kernels
from bench.lib.machine import ROOT, sources
from bench.lib.measure import check_all, default_bench
from bench.ops import attention_cases, bench_ops
from bench.ops.attention_cases import mask_mod
from bench.ops.bench_ops import best, merged, table
from bench.ops.forward_cases import Append, forward_pointwise
from bench.ops.work import SMALL, Sizes, Work
from hiar_kernels.attention.mask import visible_with_context
from hiar_kernels.attention.selection import SHAPES, Measurement, label, read
from hiar_kernels.common import triton_loader

pytestmark = pytest.mark.cpu

BENCH = default_bench()
# Imported first in a process, this hides what the GPU targets promise to do without.
BARE = """
import sys

HIDDEN = "av diffusers ftfy hypothesis jsonargparse nvtx rich safetensors transformers xdist yaml"

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN.split() else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


# Runs of pytest, one after another: one interpreter with one torch is enough for all of them. At the end of a run
# pytest looks for garbage five times, among what there was before too.
IN_TURN = """
import gc, json, sys
import pytest
import torch._dynamo

gc.freeze()
for words in json.loads(sys.argv[1]):
    print(f"exit status {int(pytest.main(words))}", flush=True)
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """As the GPU targets of the Makefile do, with only torch, triton, pytest and pytest-benchmark installed.

    In a copy of the tree, which nobody edits meanwhile: results are kept for one state of the sources. A folder with
    the results of a rehearsal in first/, and in again/ those after a part was to be run once more; and what was said by
    both, and by a search for the tests of a GPU.
    """
    folder = tmp_path_factory.mktemp("rehearsed")
    for name in ("bench", "hiar_kernels", "hiar_model", "tests"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("results"))
    shutil.copy(ROOT / "pyproject.toml", folder / "tree")
    (folder / "sitecustomize.py").write_text(BARE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of xdist
    path = os.pathsep.join(map(str, (folder, folder / "tree")))
    environment |= {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    resumed = ["-p", "bench.lib.resume", "--resume", "out/journal.jsonl"]
    ops = [*resumed, "-p", "pytest_benchmark.plugin", "bench/ops/bench_ops.py", "--benchmark-only", "--results"]
    runs = [[*ops, str(folder / "first")], [*ops, str(folder / "again"), "-k", "cross"]]
    runs.append([*resumed, "-m", "gpu", "tests/interpreter", "tests/gpu", "--collect-only", "-q"])
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(runs)], cwd=folder / "tree", env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    first, again, search, rest = done.stdout.split("exit status 0\n")
    assert not rest, done.stdout + done.stderr
    return folder, first, again, search


def test_rehearsal(rehearsed):
    folder, said, again, _ = rehearsed
    assert "REHEARSAL at small sizes" in said and "180 s of CPU, 160 of them test_two_ranks_on_two_cores" in said
    result = json.loads((folder / "first" / "ops.json").read_text())
    assert result["rehearsal"] is True
    measured = {(row["op"], row["pass"], row["variant"]) for row in result["rows"]}
    norms = ("ada_layer_norm", "layer_norm", "rms_norm", "gated_residual_ada_layer_norm", "gated_residual_layer_norm")
    for op in (*norms, "gated_residual", "qk_norm_rope"):
        assert {(op, d, variant) for d in ("forward", "backward") for variant in ("eager", "compiled")} <= measured
    for op in (
        "qk_norm_rope_append",
        "qk_norm_rope_append_fp8",
        "flow_step",
        "ring_advance",
        "merge_attention",
        "rms_silu_pad",
        "all pointwise of a forward",
    ):
        assert {(op, "forward", variant) for variant in ("eager", "compiled")} <= measured
    for op in ("visit", "pair", "block_causal", "constant_context", "cross", "bidirectional"):
        assert (f"attention: {op}", "forward", "sdpa") in measured
        named = [r for r in result["rows"] if r["shape"] == op and "impl" in r]
        keys = {(r["arch"], r["impl"], r["num_splits"]) for r in named if r["pass"] == "forward"}
        assert keys == {(0, "sdpa", 1), (0, "sdpa", 2)} if op in ("visit", "pair") else keys == {(0, "sdpa", 1)}
    for row in result["rows"]:
        assert "error" not in row and row["rate"] > 0 and row["ms"] == sorted(row["ms"])
    for name in ("triton", "cuda", "cudnn for attention"):
        assert "CUDA device" in result["absent"][name], "nothing says that our kernels were left out"
    assert "half a minute" in result["absent"]["flex with a block mask"]
    page = (folder / "first" / "ops.md").read_text()
    assert "REHEARSAL" in page and not re.search(r"\dx \|", page), "a rehearsal has no speedup"
    assert not (folder / "first" / "measured.json").exists(), "a rehearsal chooses no implementation"
    assert "4 passed in an earlier run and do not run again" in again
    assert json.loads((folder / "again" / "ops.json").read_text()) == result, "rows of earlier runs are lost"


def test_gpu_tests_need_no_more(rehearsed):
    *_, search = rehearsed
    assert len([line for line in search.splitlines() if "::" in line]) > 200


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
def test_work_of_attention(name, forward, backward):
    unit = 4 * SMALL.heads * SMALL.head_dim * (SMALL.grid[0] * SMALL.grid[1]) ** 2
    work = getattr(attention_cases, name)(BENCH, SMALL)
    assert work.forward == unit * forward
    assert backward is None or work.backward == unit * backward
    assert work.run("sdpa").shape == work.inputs[0].shape


def test_sizes_are_those_of_the_model():
    from hiar_model.config import WanConfig

    z, model = Sizes(), WanConfig.from_name("wan2.1-t2v-1.3b")
    assert (z.width, z.frame_tokens) == (1536, 1560)
    assert (z.width, z.ffn, z.heads, z.layers) == (model.dim, model.ffn_dim, model.num_heads, model.num_layers)
    assert z.grid == model.grid(60, 104) and z.text_tokens == model.text_len and z.channels == model.in_channels


def test_pointwise_of_a_forward(monkeypatch):
    """It runs the ops that the model runs, in their order, and no matmul; the compiler sees the borders."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from hiar_model.config import WanConfig
    from hiar_model.models.transformer import HiARTransformer

    monkeypatch.setattr(triton_loader, "load", lambda op, tensor: None)  # the ops run their references
    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func._schema.name)
            return func(*args, **kwargs or {})

    def ops() -> list[str]:
        found = [name for name in called if name.startswith("hiar::") and name != "hiar::attention"]
        called.clear()
        return found

    config = WanConfig(
        dim=SMALL.width, ffn_dim=SMALL.ffn, num_heads=SMALL.heads, num_layers=SMALL.layers, text_dim=8, text_len=8
    )
    model = HiARTransformer(config)
    latents = torch.randn(1, SMALL.block, config.in_channels, 2 * SMALL.grid[0], 2 * SMALL.grid[1])
    attend = Append(BENCH, SMALL, torch.randn(1, SMALL.block * SMALL.frame_tokens, SMALL.heads, SMALL.head_dim))
    work = forward_pointwise(BENCH, SMALL, gelu=True)
    with torch.no_grad():
        modulation, text = (
            model.modulation(torch.zeros(1, SMALL.block), SMALL.block),
            model.cross_attention_kv(torch.randn(1, 8, 8)),
        )
        with Watch(), hiar_kernels.prefer("triton"):
            model.run(latents, modulation, text, attend)
        wanted = ops()
        with Watch():
            ours = work.run("triton")
        assert called.count("aten::gelu") == SMALL.layers
        assert not [name for name in called if "mm" in name.split("::")[1] or "attention" in name], called
        assert ops() == wanted and "hiar::qk_norm_rope_append" in wanted
        eager = work.run("eager")
        torch._dynamo.utils.counters.clear()
        compiled = work.run("compiled")
    for other in (ours, compiled):
        torch.testing.assert_close(other.float(), eager.float(), rtol=0.02, atol=0.05)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 6, "fused across a matmul"
    assert work.forward > forward_pointwise(BENCH, SMALL).forward


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_of_flex_attention(seed):
    """Its mask_mod at every (query, key) is the rule of the kernels."""
    from torch.nn.attention.flex_attention import create_mask

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
def test_flex_attention_without_its_compiler(monkeypatch, name):
    monkeypatch.setattr(BENCH, "compiled", lambda function: function)
    monkeypatch.setattr(attention_cases, "FLEX", {"flex": "AUTO"})
    with torch.no_grad():
        work = getattr(attention_cases, name)(BENCH, SMALL)
        found, wanted = work.run("flex"), work.run("sdpa")
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0.02, atol=0.02)


# The results


def row(op: str, variant: str, ms: float, **more: Any) -> dict[str, Any]:
    values = {"op": op, "pass": "forward", "variant": variant, "ms": [ms, ms, ms]}
    values |= {"baseline": variant in ("eager", "sdpa")}
    values |= {"unit": "bytes", "rate": 1e9, "limit": 2e9, "of_limit": 0.5, "goal_ms": None, "rehearsal": False}
    return values | more


def test_what_is_wrong_gives_no_speedup():
    rows = [row(op, variant, ms) for op in ("good", "bad") for variant, ms in (("eager", 2.0), ("triton", 0.5))]
    rows.append({"op": "bad", "pass": "forward", "variant": "compiled", "error": "off by 1"})
    rows.append({"op": "good", "pass": "forward", "variant": "flex", "refused": "no backward"})
    lines = table(rows)
    assert next(line for line in lines if "good | forward | triton" in line).endswith("| 4.00x |")
    assert next(line for line in lines if "bad | forward | triton" in line).endswith("| 50% |  |")
    assert "- failed: bad forward compiled: off by 1" in lines
    assert "- refused: good forward flex: no backward" in lines
    assert not [line for line in table([{**r, "rehearsal": True} for r in rows]) if re.search(r"\dx \|", line)]


def test_goals_stand_below_the_table():
    line = "- goal: all forward triton: 2.100 ms, at most 2.5 ms"
    assert line in table([row("all", "triton", 2.1, goal_ms=2.5)])
    assert line not in table([row("all", "triton", 2.1, goal_ms=2.5, rehearsal=True)])


def test_the_choices_of_the_dispatcher(tmp_path):
    def attention(shape: str, impl: str, ms: float, num_splits: int = 1, **more: Any) -> dict[str, Any]:
        named = {"shape": shape, "impl": impl, "num_splits": num_splits, "arch": 90}
        return row(f"attention: {shape}", label(impl, num_splits), ms, **named, **more)

    rows = [attention("visit", "sdpa", 3.0), attention("visit", "cudnn", 2.5), attention("visit", "cudnn", 2.0, 2)]
    rows += [attention("visit", "triton", 2.2), row("attention: visit", "flex", 1.0, shape="visit", arch=90)]
    for impl, forward, backward in (("sdpa", 1.0, 9.0), ("triton", 2.0, 5.0)):
        rows.append(attention("block_causal", impl, forward))
        rows.append(attention("block_causal", impl, backward, **{"pass": "backward"}))
    rows.append(attention("bidirectional", "flash", 1.0))  # no backward: not for training
    rows += [
        attention("cross", "sdpa", 1.0),
        {"op": "attention: cross", "pass": "forward", "variant": "triton", "error": "x"},
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


def test_limits_stand_above_the_table(tmp_path):
    about = {"device": "a GPU", "date": "2026-01-01T00:00:00Z", "revision": "abc", "torch": "2"}
    page = bench_ops.write([row("one", "eager", 1.0)], about, tmp_path).read_text()
    assert "- limits: 2 GB/s (a large matmul" in page and "| one | forward | eager |" in page


def test_a_wrong_kernel_is_a_failure():
    right = [torch.ones(8)]
    check_all("op", [torch.ones(8) * 1.01], right)
    with pytest.raises(RuntimeError, match="op: result 0 is off by 0.05 of the mean value, allowed 0.02"):
        check_all("op", [torch.ones(8) * 1.05], right)
    with pytest.raises(RuntimeError, match="off by nan"):
        check_all("op", [torch.full((8,), float("nan"))], right)

    def broken(variant: str) -> torch.Tensor:
        raise RuntimeError(f"{variant} cannot\nsecond line")

    assert bench_ops.first_results(Work([], broken, 1.0), "flex", "forward", True)[2] == "RuntimeError: flex cannot"
    with pytest.raises(RuntimeError, match="triton cannot"):
        bench_ops.first_results(Work([], broken, 1.0), "triton", "forward", False)


def test_no_speedup_while_a_kernel_test_is_red(tmp_path):
    def journal(**outcomes: str):
        lines = [{"sources": sources(ROOT)}, *({"test": t, "outcome": o} for t, o in outcomes.items())]
        file = tmp_path / "gpu-test.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return bench_ops.failing(file)

    rows = [row("one", "eager", 2.0), row("one", "triton", 1.0)]
    assert journal(one="passed") == bench_ops.failing(tmp_path / "none") == []
    assert any("2.00x" in line for line in bench_ops.table(rows, []))
    red = journal(one="passed", two="failed")
    assert red == ["two"]
    lines = bench_ops.table(rows, red)
    assert not any("x |" in line for line in lines) and "- no speedup while 1 of make gpu-test fail: two" in lines
    file = tmp_path / "gpu-test.jsonl"
    file.write_text(file.read_text().replace(sources(ROOT), "other sources"))
    assert bench_ops.failing(file) == []
