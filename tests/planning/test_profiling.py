"""hiar profile, hiar warmup and the ranges for profilers."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from made_runs import make_rollout
from recorder import recorded
from tiny_model import MODEL, SIZE, TEXT

from hiar_kernels import nvtx
from hiar_model.cli import main
from hiar_model.config import FlowSchedule, WanConfig
from hiar_model.io import plot
from hiar_model.planning import profiling
from hiar_model.schedule.costs import LINKS, measured

pytestmark = pytest.mark.cpu

TOY = ("--model", "toy", "--window-frames", "6", "--layers", "2", "--device", "cpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_attention_fwd_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>", "attention"),
        ("_merge_attention_kernel", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("aten::addmm", "matmul"),
        ("_norm_fwd_kernel", "pointwise"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "pointwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("aten::copy_", "copy"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert profiling.kind_of(name) == kind


def test_time_that_is_covered():
    assert profiling.covered([]) == 0
    assert profiling.covered([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4


def test_calls_within_a_range():
    """What measuring itself does before and after is not counted."""
    x = torch.zeros(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        x.add(1)
        with torch.profiler.record_function("within"):
            x.mul(2)
            x.exp()
        x.sub(1)
    found = profiling.calls_within(profiler.events(), "within")
    assert [name for name in found if name in ("aten::add", "aten::mul", "aten::exp", "aten::sub")] == [
        "aten::mul",
        "aten::exp",
    ]


def test_the_least_traffic_of_pointwise_work():
    """Counted by hand for a layer of width 2 with a feed-forward of 6, one token, two bytes a number."""
    config = WanConfig(dim=2, ffn_dim=6, num_heads=1, num_layers=1)
    norms = 2 + 2  # of the cross-attention's q
    residuals = 3 * (2 + 2 + 2 + 2)  # each with the norm that follows: x, y, their sum, its norm
    rope = 6 + 6
    gelu = 6 + 6
    assert profiling.pointwise_bytes(config, 1, 2) == 2 * (norms + residuals + rope + gelu)
    deep = WanConfig(dim=2, ffn_dim=6, num_heads=1, num_layers=3)
    assert profiling.pointwise_bytes(deep, 5, 4) == 3 * 5 * 4 * (norms + residuals + rope + gelu)


@pytest.mark.parametrize(
    "options", [["--order", "wavefront", "--fuse-cache-denoise", "true"], ["--order", "block_first"]], ids=str
)
def test_a_profile(capfd, options, tmp_path):
    picture = tmp_path / "a.png"
    assert main(["profile", *TOY, "--blocks", "1", *options, "--plot", str(picture)]) == 0
    out = capfd.readouterr().out
    assert out.endswith(f"\nplot: {picture}\n") and picture.read_bytes().startswith(b"\x89PNG")
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in out.splitlines() if line.startswith("| ")}
    assert set(rows) == {"part", *profiling.KINDS, "idle"}
    for kind in ("attention", "matmul", "pointwise"):
        milliseconds, _, kernels, limit = (cell.strip() for cell in rows[kind][:4])
        assert float(milliseconds) > 0 and int(kernels) > 0 and float(limit) >= 0
    assert "toy (2 layers), random weights, latents 8x8, float32, window 6" in out
    assert "not counted on a CPU" in out and "TFLOP/s, copy" in out


def test_what_a_profile_draws(tmp_path, monkeypatch):
    """A bar for each kind of work, in milliseconds, with the least that the machine allows."""
    drawn = []
    monkeypatch.setattr(plot, "save_plot", lambda panels, path: drawn.extend(panels))
    parts = [profiling.KindTime("matmul", 0.004, 3, 0.003), profiling.KindTime("idle", 0.001, 0)]
    about = (profiling.Setting(model="toy"), "a chip", profiling.Start(0, 0, 1), 2, 0.005)
    profiling.draw_profile(profiling.Profile(*about, parts, None, None, None, 1.0), tmp_path / "a.png")
    (panel,) = drawn
    assert [(bar.label, bar.value, bar.limit, bar.note) for bar in panel.bars] == [
        ("matmul", pytest.approx(4), pytest.approx(3), "80%"), ("idle", pytest.approx(1), 0, "20%"),
    ]  # fmt: skip
    assert "5 ms a task" in panel.title and panel.unit == "ms"


def test_stage_times_feed_the_simulator(tmp_path, capsys):
    target = tmp_path / "stages.json"
    assert main(["profile", *TOY, "--stage-times", str(target)]) == 0
    _, geometry, costs = measured(target, LINKS["pcie"])
    assert (geometry.height, geometry.width) == (8, 8)
    seen = [frames for frames, _ in json.loads(target.read_text())["denoise_s"]]
    assert seen == [3, 6] and costs.curve("denoise", 0)(6) > 0
    assert main(["profile", *TOY, "--stage-times", str(target), "--plot", "a.png"]) == 2
    assert "--plot has no effect beside --stage-times" in capsys.readouterr().err
    assert main(["profile", *TOY, "--stage-times", str(tmp_path / "no" / "x.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_warm_up_says_what_it_costs(capfd):
    with recorded():
        assert main(["warmup", *TOY, "--cuda-graph=true", "--again=false"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 1
    assert main(["warmup", *TOY]) == 0
    out = capfd.readouterr().out.splitlines()
    first, _, second = (line for line in out if "process" in line)
    assert first.startswith("cold start of this process: weights ") and second.startswith("cold start of this process")
    assert "first run of" in first and "kinds of forwards (compiling, loading, capturing)" in first


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--order", "step_first"], "--order must have a steady state (stream, wavefront or block_first)"),
        (["--model", "wan"], "--model 'wan' is no known configuration; known: toy, scenes, wan"),
        (["--model", "toy", "--height", "32"], "--height must be left out: toy makes frames of one size only, got 32"),
        (["--height", "33"], "height and width must be multiples of 16, got 33x832"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
        (["--blocks", "0"], "--blocks must be a whole number of at least 1, got 0"),
        ([*TOY, "--cuda-graph", "true"], "needs a CUDA device"),
    ],
    ids=str,
)
def test_wrong_settings(capsys, options, line):
    assert main(["profile", *options]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


# Ranges


def test_ranges_are_off_and_cost_no_object():
    assert nvtx.span("layer", 3) is nvtx.span("task", "denoise(0, 1)")


def test_ranges_of_a_rollout():
    """generate > block > task > layer > op, nested."""
    rollout = make_rollout(MODEL, TEXT, FlowSchedule.uniform(2), num_frames=6, order="stream", **SIZE)
    nvtx.enable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            list(rollout)
    finally:
        nvtx.enable(False)
    ranges = [e for e in profiler.events() if not e.name.startswith("aten::")]
    names = {e.name for e in ranges}
    assert {"block 0", "block 1", "task denoise(0, 0)", "task denoise(1, 1)", "layer 0", "layer 1"} <= names
    assert {"qkv", "self-attention", "qk_norm_rope_append", "attention", "cross-attention", "feed-forward"} <= names

    def inside(inner: str, outer: str) -> bool:
        a, b = (next(e for e in ranges if e.name == name).time_range for name in (inner, outer))
        return b.start <= a.start and a.end <= b.end

    chain = ["attention", "self-attention", "layer 0", "task denoise(0, 0)", "block 0"]
    assert all(inside(*two) for two in itertools.pairwise(chain))
