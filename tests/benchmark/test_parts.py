"""Where the time of a task goes, hiar warmup, and the ranges for profilers."""

from __future__ import annotations

import itertools

import pytest
import torch
from made_runs import make_rollout
from recorder import recorded
from tiny_model import MODEL, SIZE, TEXT

from hiar_kernels import nvtx
from hiar_model.benchmark import parts
from hiar_model.cli import main
from hiar_model.config import FlowSchedule, WanConfig

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
    assert parts.kind_of(name) == kind


def test_time_that_is_covered():
    assert parts.covered([]) == 0
    assert parts.covered([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4
    assert parts.covered([(0, 10), (1, 2), (3, 4), (9, 11)]) == 11


def test_calls_within_a_range():
    """What measuring itself does before and after is not counted."""
    x = torch.zeros(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        x.add(1)
        with torch.profiler.record_function("within"):
            x.mul(2)
            x.exp()
        x.sub(1)
    found = parts.calls_within(profiler.events(), "within")
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
    assert parts.pointwise_bytes(config, 1, 2) == 2 * (norms + residuals + rope + gelu)
    deep = WanConfig(dim=2, ffn_dim=6, num_heads=1, num_layers=3)
    assert parts.pointwise_bytes(deep, 5, 4) == 3 * 5 * 4 * (norms + residuals + rope + gelu)


def test_a_warm_up_says_what_it_costs(capfd):
    with recorded():
        assert main(["warmup", *TOY, "--cuda-graph=true", "--again=false"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 1
    assert main(["warmup", *TOY]) == 0
    out = capfd.readouterr().out.splitlines()
    first, _, second = (line for line in out if "process" in line)
    assert first.startswith("cold start of this process: weights ") and second.startswith("cold start of this process")
    assert "first run of" in first and "kinds of forwards (compiling, loading, capturing)" in first


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
