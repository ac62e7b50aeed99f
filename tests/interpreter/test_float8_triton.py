"""Rows in 8 bits by Triton: equal to the reference to the bit where nothing but division and rounding happens."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget, normal
from torch import Tensor

import hiar_kernels as hk
from hiar_kernels.common.float8 import ROW_DTYPES
from hiar_kernels.norm.inputs import QUANTIZED

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

SHAPES = {"rows": (2, 5, 40), "one row": (33,), "one number": (3, 1), "wide": (2, 2100), "many rows": (37, 24)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """In float32, as the numbers were before: the budget allows a unit in the last place of that."""
    return values.float() * scales[..., None]


@pytest.mark.parametrize("to", ROW_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits(shape, dtype, to, device):
    x = (normal(*SHAPES[shape]) * normal(*SHAPES[shape][:-1], 1, seed=1).exp()).to(dtype)
    values, scales = hk.quantize_rows(x.to(device), dtype=to, impl="triton")
    eager = hk.quantize_rows(x, dtype=to, impl="reference")
    assert torch.equal(scales.cpu(), eager[1]) and values.dtype == to
    assert torch.equal(values.cpu().view(torch.uint8), eager[0].view(torch.uint8))


def test_every_step_and_tie_of_the_format(device):
    """All numbers of e4m3, what lies halfway between two, and the nearest float32 on both sides of that."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = codes[codes.isfinite()].unique()
    ties = (levels[1:] + levels[:-1]) / 2
    above, below = (torch.nextafter(ties, torch.full_like(ties, end)) for end in (1000.0, -1000.0))
    x = torch.cat([levels, ties, above, below, -torch.zeros(1)])  # the largest is 448: the scale is 1
    values, scale = hk.quantize_rows(x.to(device), impl="triton")
    assert float(scale) == 1.0
    assert torch.equal(values.cpu().view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_every_step_and_tie_of_int8(device):
    x = torch.arange(-127, 127.5, 0.5)  # the largest is 127: the scale is 1
    values, scale = hk.quantize_rows(x.to(device), dtype=torch.int8, impl="triton")
    assert float(scale) == 1.0
    assert torch.equal(values.cpu(), x.round().to(torch.int8))


def test_rows_that_are_not_finite(device):
    x = normal(5, 12).float()
    x[0, 3], x[1, 0], x[2, 5], x[3] = torch.nan, torch.inf, -torch.inf, 0
    for activation in (None, "gelu_tanh"):
        values, scales = (t.cpu() for t in hk.quantize_rows(x.to(device), activation=activation, impl="triton"))
        assert bool(scales[:3].eq(1).all()) and bool(values[:3].float().isnan().all())
        assert not values[3].float().any() and bool(scales[3] > 0) and bool(values[4].float().isfinite().all())
        values, scales = (
            t.cpu() for t in hk.quantize_rows(x.to(device), activation=activation, dtype=torch.int8, impl="triton")
        )
        assert bool(scales[:3].isnan().all()) and not values[:4].any()
        assert bool(scales[3:].isfinite().all()) and bool(values[4].any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape, dtype, device):
    x = (3 * normal(*SHAPES[shape])).to(dtype)
    found = hk.quantize_rows(x.to(device), activation="gelu_tanh", impl="triton")
    eager = hk.quantize_rows(x, activation="gelu_tanh", impl="reference")
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    # Far below zero torch's tanh makes the reference 0, where the kernel has what is left of x.
    torch.testing.assert_close(found[1].cpu(), eager[1], rtol=1e-6, atol=1e-9)
    assert_within_budget(dequantize(*found).cpu(), dequantize(*eager), exact, "GELU")


def test_views_are_read_where_they_lie(device):
    x = torch.full((6, 50), torch.nan, device=device)[1::2, 5:45]
    x.copy_(normal(3, 40))
    values, scales = hk.quantize_rows(x, impl="triton")
    again = hk.quantize_rows(x.t().contiguous().t(), impl="triton")
    assert torch.equal(scales.cpu(), hk.quantize_rows(x.cpu(), impl="reference")[1])
    assert torch.equal(values.view(torch.uint8), again[0].view(torch.uint8)) and torch.equal(scales, again[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("to", ROW_DTYPES, ids=str)
@pytest.mark.parametrize("name", QUANTIZED)
def test_norms(name, to, gated, dtype, device):
    """h to the bit as the op in full precision gives it; its norm as near to the exact one as the reference's."""
    x, y = (normal(2, 15, 40, seed=seed).to(dtype) for seed in (1, 2))
    gate, shift, scale = (normal(2, 3, 40, seed=seed).float() for seed in (3, 4, 5))
    first = (y, gate if gated else None) if "residual" in name else ()
    arguments = (x, *first, shift, scale)
    there = [t if t is None else t.to(device) for t in arguments]
    *h, values, scales = (t.cpu() for t in getattr(hk, name)(*there, dtype=to, impl="triton"))
    *_, eager_values, eager_scales = getattr(hk, name)(*arguments, dtype=to, impl="reference")
    if first:
        plain, _ = getattr(hk, QUANTIZED[name])(*there, impl="triton")
        assert torch.equal(h[0], plain.cpu())
        # The norm is that of h as it was stored.
        exact = hk.reference.ada_layer_norm(h[0].double(), shift.double(), scale.double())
    else:
        exact = hk.reference.ada_layer_norm(x.double(), shift.double(), scale.double())
    torch.testing.assert_close(scales, eager_scales, rtol=1e-5, atol=0)
    assert_within_budget(dequantize(values, scales), dequantize(eager_values, eager_scales), exact, "norm")
