"""Linear layers in 8 bits on the tensor cores: the arithmetic that a CPU emulates, in a captured graph too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hiar_kernels import quantize_rows
from hiar_model.models.fp8_linear import Float8Linear

pytestmark = pytest.mark.gpu


@pytest.fixture
def layers() -> tuple[Float8Linear, Float8Linear]:
    """The same layer on the CPU and on the device."""
    torch.manual_seed(0)
    linear = nn.Linear(1536, 4608).to(torch.bfloat16).requires_grad_(False)
    return Float8Linear(linear), Float8Linear(copy.deepcopy(linear).to("cuda"))


def test_the_device_computes_what_the_cpu_emulates(layers):
    here, there = layers
    assert torch.equal(here.weight.view(torch.uint8), there.weight.cpu().view(torch.uint8))
    assert torch.equal(here.weight_scale, there.weight_scale.cpu())
    x = torch.randn(2, 100, 1536, dtype=torch.bfloat16)
    values, scales = quantize_rows(x.cuda())
    exact = values.double().cpu() * scales.double().cpu()[..., None]
    exact = exact @ (here.weight.double() * here.weight_scale.double()[:, None]).T + here.bias.double()
    error = (there((values, scales)).cpu().double() - exact).abs().max()
    emulated = (here((values.cpu(), scales.cpu())).double() - exact).abs().max()
    assert float(error) <= 2 * float(emulated) + float(exact.abs().max()) * 2**-8


def test_in_a_captured_graph(layers):
    _, layer = layers
    x = torch.randn(1, 64, 1536, dtype=torch.bfloat16, device="cuda")
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, layer(x))
