"""int8_linear: sums of whole numbers, scaled once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hiar_kernels as hk

pytestmark = pytest.mark.cpu


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@pytest.mark.parametrize("shape", [(2, 3, 40), (40,), (1, 1), (0, 8), (5, 3000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_numbers_are_added_exactly(shape, dtype):
    """3000 products of 127 x 127 need 26 bits, more than float32 has."""
    x, weight = draw(*shape), draw(7, shape[-1], seed=1)
    if shape == (5, 3000):
        x, weight = x.abs().clamp_min(126), weight.abs().clamp_min(126)
    scales, steps, bias = torch.rand(shape[:-1]), torch.rand(7), torch.randn(7).to(dtype)
    y = hk.int8_linear(x, scales, weight, steps, bias)
    total = (x.long().unsqueeze(-2) * weight.long()).sum(-1).float()
    expected = torch.addcmul(bias.float(), total * scales[..., None], steps).to(dtype)
    assert y.dtype == dtype and torch.equal(y, expected)


@torch.no_grad()
def test_near_the_layer_in_full():
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 64), torch.randn(3, 9, 256)
    weight = hk.quantize_rows(layer.weight, dtype=torch.int8)
    y, exact = hk.int8_linear(*hk.quantize_rows(x, dtype=torch.int8), *weight, layer.bias.detach()), layer(x)
    eight = hk.quantize_rows(x), hk.quantize_rows(layer.weight)
    rounded = [values.float() * scales[..., None] for values, scales in eight]
    error, of_e4m3 = (y - exact).norm(), (nn.functional.linear(*rounded, layer.bias) - exact).norm()
    assert error < 0.4 * of_e4m3


def test_a_row_that_is_not_finite_is_nan_alone():
    x = torch.randn(3, 8)
    x[1, 2] = torch.inf
    y = hk.int8_linear(*hk.quantize_rows(x, dtype=torch.int8), draw(4, 8), torch.ones(4), torch.zeros(4))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


LEGAL = (draw(2, 3, 8), torch.ones(2, 3), draw(4, 8), torch.ones(4), torch.zeros(4))


@pytest.mark.parametrize(
    ("at", "wrong", "line"),
    [
        (0, torch.zeros(2, 3, 8), "int8_linear: x must be int8, got torch.float32"),
        (0, torch.tensor(1, dtype=torch.int8), "int8_linear: x must be [..., 1 <= K <= 65536], got []"),
        (1, torch.ones(3), "int8_linear: x_scales must be [2, 3], got [3]"),
        (1, torch.ones(2, 3, dtype=torch.float64), "int8_linear: x_scales must be float32, got torch.float64"),
        (2, draw(4, 9), "int8_linear: weight must be [4, 8], got [4, 9]"),
        (2, LEGAL[3], "int8_linear: weight must be int8, got torch.float32"),
        (3, torch.ones(5), "int8_linear: weight_scales must be [4], got [5]"),
        (4, torch.zeros(4).double(), "int8_linear: bias must be bfloat16, float16 or float32, got torch.float64"),
        (4, None, "int8_linear: bias must be a torch.Tensor, got NoneType"),
    ],
)  # fmt: skip
def test_refused(at, wrong, line):
    arguments = [*LEGAL[:at], wrong, *LEGAL[at + 1 :]]
    with pytest.raises(ValueError) as refusal:
        hk.int8_linear(*arguments)
    assert str(refusal.value) == line
