"""Linear layers in 8 bits on the tensor cores: the arithmetic that a CPU emulates, in a captured graph too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hiar_kernels import quantize_rows
from hiar_kernels.common.float8 import ROW_DTYPES
from hiar_model import HiARTransformer, WanConfig
from hiar_model.models.checkpoint import load_transformer, save_transformer
from hiar_model.models.quantized_linear import QuantizedLinear

pytestmark = pytest.mark.gpu


@pytest.fixture(params=ROW_DTYPES, ids=str)
def layers(request) -> tuple[QuantizedLinear, QuantizedLinear]:
    """The same layer on the CPU and on the device."""
    torch.manual_seed(0)
    linear = nn.Linear(1536, 4608).to(torch.bfloat16).requires_grad_(False)
    return QuantizedLinear(linear, request.param), QuantizedLinear(copy.deepcopy(linear).to("cuda"), request.param)


def test_the_device_computes_what_the_cpu_emulates(layers):
    here, there = layers
    assert torch.equal(here.weight.view(torch.uint8), there.weight.cpu().view(torch.uint8))
    assert torch.equal(here.weight_scale, there.weight_scale.cpu())
    x = torch.randn(2, 100, 1536, dtype=torch.bfloat16)
    values, scales = quantize_rows(x.cuda(), dtype=here.rows_dtype)
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


def test_weights_that_are_quantised_on_the_device_have_the_bits_of_the_cpu(tmp_path):
    """Loaded matrix by matrix; the peak is that of 8 bits and less than one more block."""
    config = WanConfig(dim=512, ffn_dim=2048, num_layers=4, num_heads=4, text_dim=64)
    torch.manual_seed(0)
    save_transformer(HiARTransformer(config).to(torch.bfloat16), file := tmp_path / "w.safetensors")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    there = load_transformer(file, device="cuda", linear_dtype="float8_e4m3fn")
    own = sum(x.nbytes for x in (*there.parameters(), *there.buffers()))
    block = 2 * (8 * 512 * 512 + 2 * 512 * 2048)
    assert torch.cuda.max_memory_allocated() - before < 1.05 * own + block
    here = load_transformer(file, linear_dtype="float8_e4m3fn").state_dict()
    for key, value in there.state_dict().items():
        assert torch.equal(value.cpu().contiguous().view(torch.uint8), here[key].contiguous().view(torch.uint8)), key
