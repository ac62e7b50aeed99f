"""attention_fp8 by Triton: as near to the exact result as the reference is."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget
from eight_bits import Ring, exactly, queries
from refusals import refusal

import hiar_kernels as hk
from hiar_kernels.common.float8 import quantize_last

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

CASES = {
    "one block of keys": (16, 1, 32),
    "places without a key": (5, 2, 32),
    "blocks and a rest": (37, 2, 64),
    "wide heads": (18, 1, 128),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def setting(tokens: int, device: torch.device) -> dict:
    """Two rows at different tasks, a window with a sink, an empty slot (2), and one not visible yet (3 of row 1)."""
    q_frames, kv_frames = [[4, 5], [2, 3]], [[0, 4, -1, 3, 5, 1], [0, 2, -1, 9, 3, 1]]
    return {
        "mask": hk.BlockCausal(tokens, frames_per_block=2, window_frames=(5, 4), sink_frames=1),
        "q_frames": torch.tensor(q_frames, device=device),
        "kv_frames": torch.tensor(kv_frames, dtype=torch.int32, device=device),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_within_budget(case, dtype, device):
    tokens, heads, width = CASES[case]
    ring, ids = Ring.random(2, 6, tokens, heads, width), setting(tokens, device)
    q, options = queries(2, 2 * tokens, heads, width), {}
    if dtype == torch.float8_e4m3fn:
        q, q_scales = quantize_last(q)
        options = {"q_scales": q_scales.to(device), "out_dtype": torch.float32}
    q = q.to(device, dtype)
    there = ring.without(2, tokens).to(device).arguments
    out = hk.attention_fp8(q, *there, impl="triton", **ids, **options)
    assert torch.equal(out, hk.attention_fp8(q, *there, impl="triton", **ids, **options))
    eager = hk.attention_fp8(q, *there, impl="reference", **ids, **options)
    on_cpu = {name: x if name == "mask" else x.cpu() for name, x in ids.items()}
    if dtype in (torch.bfloat16, torch.float16):  # the reference rounds nothing but the result; a kernel probabilities
        k, v = (x.to(dtype) for x in ring.exact)
        eager = hk.attention(q.cpu(), k, v, impl="sdpa", **on_cpu)
    q_scales = options.get("q_scales")
    exact = exactly(q.cpu(), ring, None if q_scales is None else q_scales.cpu(), **on_cpu)
    assert_within_budget(out.cpu(), eager.cpu(), exact, case)


@pytest.mark.parametrize("eight", [False, True])
def test_views_and_rows_that_see_nothing(eight, device):
    """q is a part of a tensor, the ring the first slots of a longer one; nothing visible gives 0."""
    tokens, width = 5, 32
    ring = Ring.random(1, 4, tokens, 2, width).to(device)
    q = queries(1, 10, 2, width).to(device)
    options = {"out_dtype": torch.float32} if eight else {}
    if eight:
        q, q_scales = quantize_last(q)
        options["q_scales"] = q_scales[:, 5:]
    k, v, k_scales, v_scales = ring.arguments
    views = k[:, : 2 * tokens], v[:, :2], k_scales[:, :2], v_scales[:, :2]
    ids = {"mask": hk.BlockCausal(tokens, 1), "q_frames": torch.tensor([[3]], device=device)}
    for frames in ([3, 1], [-1, 7]):
        ids["kv_frames"] = torch.tensor([frames], device=device)
        out = hk.attention_fp8(q[:, 5:], *views, impl="triton", **ids, **options)
        eager = hk.attention_fp8(q[:, 5:], *views, impl="reference", **ids, **options)
        torch.testing.assert_close(out, eager, rtol=0, atol=1e-2 if eight else 1e-5)
        assert out.any() == (frames[0] == 3)


def test_a_slot_that_is_nan_and_seen_shows(device):
    ring = Ring.random(1, 2, 5, 2, 32).without(1, 5).to(device)
    q = queries(1, 5, 2, 32).to(device)
    ids = {"mask": hk.BlockCausal(5, 1), "q_frames": torch.tensor([[3]], device=device)}
    q8, q_scales = quantize_last(q)
    for frames, bad in (([3, 7], False), ([3, 2], True)):
        ids["kv_frames"] = torch.tensor([frames], device=device)
        for out in (
            hk.attention_fp8(q, *ring.arguments, impl="triton", **ids),
            hk.attention_fp8(q8, *ring.arguments, q_scales=q_scales, impl="triton", **ids),
        ):
            assert bool(out.isnan().any()) == bad


def test_what_the_kernel_does_not_take_is_refused(device):
    ring = Ring.random(1, 2, 5, 2, 16).to(device)
    q8, q_scales = quantize_last(queries(1, 5, 2, 16).to(device))
    frames = torch.tensor([[1]], device=device)
    ids = {"mask": hk.BlockCausal(5, 1), "q_frames": frames, "kv_frames": frames.expand(1, 2)}
    line = refusal(lambda: hk.attention_fp8(q8, *ring.arguments, q_scales=q_scales, impl="triton", **ids))
    assert line == "attention_fp8: impl='triton' has head_dim 32, 64, 128, got 16"
    double = q8.double()
    line = refusal(lambda: hk.attention_fp8(double, *ring.arguments, impl="triton", **ids))
    assert line == "attention_fp8: impl='triton' takes q as bfloat16, float16, float32 or 8 bits, got torch.float64"
