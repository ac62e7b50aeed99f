"""rms_silu_pad against the chain that it stands for, in float64 and within the error budget of narrow dtypes."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget, normal
from torch import Tensor

from hiar_kernels import rms_silu_pad

pytestmark = pytest.mark.cpu

NARROW = [torch.float32, torch.bfloat16, torch.float16]


def chain(x: Tensor, weight: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Wan's VAE, one step after the other: norm over channels, weight, SiLU; zeros or cached frames in front."""
    y = x / x.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12) * x.shape[1] ** 0.5
    y = y * weight[:, None, None, None]
    y = y * torch.sigmoid(y)
    zeros = torch.zeros_like(y[:, :, :1])
    out = torch.cat([zeros, zeros, *([] if cache is None else [cache]), y], 2)[:, :, -y.shape[2] - 2 :]
    return out, out[:, :, -2:]


X, WEIGHT = 3 * normal(2, 10, 4, 3, 5, seed=1), 1 + 0.2 * normal(10, seed=2)
CACHES = {"start": None, "one frame": normal(2, 10, 1, 3, 5, seed=3), "two frames": normal(2, 10, 2, 3, 5, seed=3)}


def run(op, cache: Tensor | None, dtype: torch.dtype, frames: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    """Both results, and the gradients of what goes in for a fixed weighting of them."""
    leaves = [t.to(dtype).clone().requires_grad_() for t in (X[:, :, :frames], WEIGHT, cache) if t is not None]
    outs = op(*leaves)
    sum((out * normal(*out.shape, seed=9 + i).to(dtype)).sum() for i, out in enumerate(outs)).backward()
    return [out.detach() for out in outs], [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("cache", CACHES)
def test_float64(cache, frames):
    found, wanted = (run(op, CACHES[cache], torch.float64, frames) for op in (rms_silu_pad, chain))
    for a, b in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("cache", CACHES)
def test_error_budget(cache, dtype):
    def seen(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype).double()

    arguments = [seen(t) for t in (X, WEIGHT, CACHES[cache])]
    narrow = [t if t is None else t.to(dtype) for t in arguments]
    three = rms_silu_pad(*narrow), chain(*narrow), chain(*arguments)
    for i, (a, b, c) in enumerate(zip(*three, strict=True)):
        assert_within_budget(a, b, c, f"result {i}")


def test_gradcheck():
    leaves = [t.clone().requires_grad_() for t in (X[:1, :, :2], WEIGHT, CACHES["two frames"][:1])]
    assert torch.autograd.gradcheck(rms_silu_pad, leaves, fast_mode=True)


@pytest.mark.parametrize("pieces", [(1, 3), (1, 1, 1, 1), (3, 1), (2, 2)], ids=str)
def test_pieces_are_the_whole(pieces):
    """What a causal convolution sees before a frame is the same, however the clip was cut."""
    whole, _ = rms_silu_pad(X, WEIGHT)
    cache, begin = None, 0
    for size in pieces:
        out, cache = rms_silu_pad(X[:, :, begin : begin + size], WEIGHT, cache)
        torch.testing.assert_close(out, whole[:, :, begin : begin + size + 2], rtol=1e-12, atol=1e-12)
        begin += size


def test_a_pixel_of_zeros_stays_zero():
    out, _ = rms_silu_pad(torch.zeros(1, 4, 1, 1, 2), torch.ones(4))
    assert not out.any()


@pytest.mark.parametrize("cached_last", [False, True])
def test_results_lie_as_x_does(cached_last):
    last = torch.channels_last_3d
    cache = CACHES["two frames"].contiguous(memory_format=last) if cached_last else CACHES["two frames"]
    wanted = rms_silu_pad(X, WEIGHT, cache)
    assert all(out.is_contiguous() for out in wanted)
    found = rms_silu_pad(X.contiguous(memory_format=last), WEIGHT, cache)
    assert all(out.is_contiguous(memory_format=last) for out in found)
    turned = rms_silu_pad(X.transpose(3, 4).contiguous().transpose(3, 4), WEIGHT, cache)
    assert all(out.is_contiguous() for out in turned)
    for a, b, c in zip(found, turned, wanted, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-12)
