"""int8_linear in Triton: the reference's sums to the bit, whatever the tiles cut."""

from __future__ import annotations

import pytest
import torch

import hiar_kernels as hk

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

SHAPES = {
    "cut tiles": (2, 21, 40, 19),
    "one number": (1, 1, 1, 1),
    "many tiles": (1, 150, 32, 40),
    "no rows": (2, 0, 8, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_reference(shape, dtype, device):
    *rows, channels, outputs = SHAPES[shape]
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (*n, channels), generator=draw).to(torch.int8) for n in (rows, [outputs]))
    ones = torch.ones(rows), torch.ones(outputs)
    arguments = (x, ones[0], weight, ones[1], torch.zeros(outputs))
    y = hk.int8_linear(*(t.to(device) for t in arguments), impl="triton").cpu()
    assert torch.equal(y, hk.int8_linear(*arguments, impl="reference"))  # the sums
    scales, steps, bias = (torch.rand(n, generator=draw) for n in (rows, outputs, outputs))
    arguments = (x, scales, weight, steps, bias.to(dtype))
    y = hk.int8_linear(*(t.to(device) for t in arguments), impl="triton").cpu()
    # A product and a sum may be contracted: a unit in the last place of float32, before the one rounding.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y, hk.int8_linear(*arguments, impl="reference"), rtol=2 * unit, atol=16 * unit)


def test_rows_that_are_not_finite_and_views(device):
    x = torch.randn(9, 80, generator=torch.Generator().manual_seed(0))[::2, 20:60]
    x[1, 2] = torch.nan
    rows = hk.quantize_rows(x, dtype=torch.int8)
    wide = torch.zeros(5, 90, dtype=torch.int8)
    wide[:, 30:70] = rows[0]
    weight = hk.quantize_rows(torch.randn(7, 40, generator=torch.Generator().manual_seed(1)), dtype=torch.int8)
    expected = hk.int8_linear(*rows, *weight, torch.zeros(7), impl="reference")
    there = [t.to(device) for t in (wide, rows[1], *weight, torch.zeros(7))]
    y = hk.int8_linear(there[0][:, 30:70], *there[1:], impl="triton").cpu()
    assert y[1].isnan().all() and y[[0, 2, 3, 4]].isfinite().all()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
