"""The Triton rms_silu_pad against the float64 reference: error budget, odd sizes, both memory formats."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget, normal
from torch import Tensor

from hiar_kernels import rms_silu_pad
from hiar_kernels.common import triton_loader

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

NARROW = [torch.float32, torch.bfloat16, torch.float16]
LAST = {"dense": torch.contiguous_format, "channels last": torch.channels_last_3d}
SHAPES = {  # x, frames of the cache
    "a clip": ((2, 40, 3, 5, 7), 2),
    "its first frame": ((1, 24, 1, 6, 4), 0),
    "its second frame": ((1, 24, 1, 6, 4), 1),
    "one pixel, one channel": ((1, 1, 2, 1, 1), 2),
    "more pixels than a tile": ((1, 16, 1, 13, 17), 2),
    "wide": ((1, 1030, 1, 3, 11), 1),
    "without a past": ((2, 33, 4, 3, 3), 0),
}


def arguments(shape: str) -> tuple[Tensor, Tensor, Tensor | None]:
    (batch, channels, frames, *size), known = SHAPES[shape]
    cache = normal(batch, channels, known, *size, seed=3) if known else None
    return 3 * normal(batch, channels, frames, *size, seed=1), 1 + 0.2 * normal(channels, seed=2), cache


def compare(given: tuple[Tensor | None, ...], dtypes: tuple[torch.dtype, torch.dtype], memory, device) -> None:
    """Within the budget that the reference in the same dtypes sets; dtypes of x and cache, of the weight."""
    kinds = (dtypes[0], dtypes[1], dtypes[0])
    narrow = [None if t is None else t.to(kind) for t, kind in zip(given, kinds, strict=True)]
    exact = rms_silu_pad(*(None if t is None else t.double() for t in narrow), impl="reference")
    eager = rms_silu_pad(*narrow, impl="reference")
    there = [None if t is None else t.to(device) for t in narrow]
    there = [t.contiguous(memory_format=memory) if t is not None and t.dim() == 5 else t for t in there]
    found = rms_silu_pad(*there, impl="triton")
    for i, three in enumerate(zip(found, eager, exact, strict=True)):
        assert three[0].is_contiguous(memory_format=memory)
        assert_within_budget(three[0].cpu(), *three[1:], f"result {i}")


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("memory", LAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget(shape, memory, dtype, device):
    if 1 in SHAPES[shape][0][1:2]:
        memory = "dense"  # of one channel the two are one
    compare(arguments(shape), (dtype, dtype), LAST[memory], device)


def test_a_weight_in_another_dtype(device):
    compare(arguments("a clip"), (torch.bfloat16, torch.float32), torch.contiguous_format, device)


def test_the_frames_of_the_past_are_copied_to_the_bit(device):
    x, weight, cache = (t.to(device, torch.bfloat16) for t in arguments("a clip"))
    cache[0, 0, 0, 0, 0] = torch.nan  # and what is in them reaches nothing else
    out, after = rms_silu_pad(x, weight, cache, impl="triton")
    assert torch.equal(out[:, :, :2].nan_to_num(7), cache.nan_to_num(7))
    assert torch.equal(after, out[:, :, -2:]) and bool(out[:, :, 2:].isfinite().all())
    out, after = rms_silu_pad(x[:, :, :1], weight, cache[:, :, 1:], impl="triton")
    assert not out[:, :, 0].any() and torch.equal(out[:, :, 1:2], cache[:, :, 1:]) and torch.equal(after, out[:, :, 1:])


@pytest.mark.parametrize("memory", LAST)
def test_views_are_read_where_they_lie(memory, device):
    """Frames of a longer clip and channels of a wider one, with NaN all around; the cache in the other format."""
    around = torch.full((4, 30, 9, 5, 7), torch.nan, device=device)
    around = around.contiguous(memory_format=LAST[memory])
    x, cache = around[1:3, 3:23, 2:8:2], around[::2, 8:28, 6:8]
    x.copy_(normal(*x.shape, seed=1))
    other = LAST["dense" if memory == "channels last" else "channels last"]
    cache = normal(*cache.shape, seed=2).to(device, torch.float32).contiguous(memory_format=other)
    weight = torch.full((40,), torch.nan, device=device)[::2]
    weight.copy_(normal(20, seed=3))
    found = rms_silu_pad(x, weight, cache, impl="triton")
    wanted = rms_silu_pad(x.contiguous(), weight.contiguous(), cache.contiguous(), impl="reference")
    torch.testing.assert_close([t.contiguous() for t in found], list(wanted), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("size", [1e-18, 1e4])
def test_any_scale(size, device):
    """The norm takes the scale away; the kernel loses nothing to it."""
    x, weight, cache = arguments("a clip")
    compare((x * size, weight, cache), (torch.float32, torch.float32), torch.contiguous_format, device)


def test_zeros_stay_zeros(device):
    out, after = rms_silu_pad(torch.zeros(1, 20, 2, 3, 3, device=device), torch.ones(20, device=device), impl="triton")
    assert not out.any() and not after.any()


def test_gradients_are_those_of_the_reference(device):
    leaves = [t.to(device, torch.float32).requires_grad_() for t in arguments("a clip")]
    outs = {impl: rms_silu_pad(*leaves, impl=impl) for impl in ("triton", "reference")}
    found = {impl: torch.autograd.grad([o.sum() for o in out], leaves) for impl, out in outs.items()}
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-5, atol=1e-5)


def test_opcheck(device):
    x, weight, cache = (t.to(device, torch.bfloat16).requires_grad_() for t in arguments("a clip"))
    triton_loader.load("rms_silu_pad", x)
    last = x.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    for given in ((x, weight, cache), (x, weight, None), (last, weight, cache)):
        torch.library.opcheck(
            torch.ops.hiar.rms_silu_pad.default,
            (*given, 1e-12),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_compile_without_breaks(device):
    given = [t.to(device, torch.float32) for t in arguments("a clip")]
    compiled = torch.compile(lambda *a: rms_silu_pad(*a, impl="triton"), fullgraph=True, backend="aot_eager")
    plain = rms_silu_pad(*given, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled(*given), strict=True))


REFUSED = {
    "x in float64": (
        lambda x, w: rms_silu_pad(x.double(), w, impl="triton"),
        "rms_silu_pad: impl='triton' takes x as bfloat16, float16 or float32, got torch.float64",
    ),
    "another device": (
        lambda x, w: rms_silu_pad(x, w.to("meta"), impl="triton"),
        "rms_silu_pad: weight must be on {device} like x, got meta",
    ),
    "too wide": (
        lambda x, w: rms_silu_pad(x.new_zeros(1, 2049, 1, 1, 1), w.new_zeros(2049), impl="triton"),
        "rms_silu_pad: impl='triton' takes at most 2048 channels, got 2049",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_in_one_line(what, device):
    call, line = REFUSED[what]
    x, weight = torch.zeros(1, 3, 1, 2, 2, device=device), torch.ones(3, device=device)
    with pytest.raises(ValueError) as refused:
        call(x, weight)
    assert str(refused.value) == line.format(device=x.device)


def test_a_nan_takes_its_pixel_with_it(device):
    """As in the reference. A maximum that drops NaN, as GPUs have it, would leave the other channels x / eps."""
    x = torch.ones(1, 20, 1, 3, 3, device=device)
    x[0, 7, 0, 1, 1] = torch.nan
    out, _ = rms_silu_pad(x, torch.ones(20, device=device), impl="triton")
    lost = out[0, :, 2].isnan()
    assert bool(lost[:, 1, 1].all()) and int(lost.sum()) == 20
