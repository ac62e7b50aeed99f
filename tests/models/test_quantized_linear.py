"""Linear layers in 8 bits: the arithmetic, the model that shares all else, and rollouts in every order."""

from __future__ import annotations

import pytest
import torch
from refusals import refusal
from tiny_model import make_model
from torch import Tensor, nn

from hiar_kernels import quantize_rows, taken
from hiar_kernels.common.float8 import E4M3, ROW_DTYPES
from hiar_model import ExecutionConfig, Rollout, RolloutConfig
from hiar_model.models.quantized_linear import QuantizedLinear, linear_dtype_of, quantized

pytestmark = pytest.mark.cpu


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantized(x: Tensor, to: torch.dtype = E4M3) -> Tensor:
    values, scales = quantize_rows(x, dtype=to)
    return values.double() * scales.double()[..., None]


@pytest.mark.parametrize("to", ROW_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_product_is_that_of_the_quantised_numbers(dtype, to):
    linear, x = nn.Linear(48, 20).to(dtype), 3 * normal(2, 5, 48).to(dtype)
    layer = QuantizedLinear(linear, to)
    exact = dequantized(x, to) @ dequantized(linear.weight.detach(), to).T + linear.bias.double()
    y = layer(x)
    assert y.dtype == dtype and layer.weight.dtype == to
    rtol = 1e-5 if dtype == torch.float32 else 2**-7  # float32 sums; one more unit in the last place of bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=1e-5)
    assert torch.equal(layer(quantize_rows(x, dtype=to)), y)  # quantised by a norm, or here
    one, all_rows = (
        quantize_rows(x[:1, :2], dtype=to),
        quantize_rows(x, dtype=to),
    )  # a token does not depend on the others
    assert torch.equal(one[1], all_rows[1][:1, :2]) and torch.equal(one[0].float(), all_rows[0][:1, :2].float())


def test_outliers_of_one_channel_or_token_leave_the_others_alone():
    linear, x = nn.Linear(64, 64), normal(1, 8, 64)
    with torch.no_grad():
        linear.weight[3] *= 1000
        x[0, 2] *= 1000
        expected = linear(x)
        error = (QuantizedLinear(linear)(x) - expected).abs() / expected.abs().mean(-1, keepdim=True)
    assert float(error[0, [0, 1, 3], :3].max()) < 0.2 and float(error[0, 2, :3].max()) < 0.2


def test_a_copy_that_shares_all_else():
    model = make_model()
    twin = quantized(model)
    assert linear_dtype_of(twin) == torch.float8_e4m3fn and linear_dtype_of(model) is None
    assert quantized(twin) is twin and quantized(model) is twin
    changed = {name for name, module in twin.named_modules() if isinstance(module, QuantizedLinear)}
    layers = len(model.blocks)
    assert len(changed) == 4 * layers and not any("cross" in name for name in changed)
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert all(theirs[name] is ours[name] for name in theirs)
    assert {name.removesuffix(".weight") for name in ours.keys() - theirs.keys()} == changed
    with torch.no_grad():
        model.blocks[0].ffn[0].weight.add_(1)
    again = quantized(model)
    assert again is not twin
    assert not torch.equal(again.blocks[0].ffn[0].weight_scale, twin.blocks[0].ffn[0].weight_scale)


@pytest.mark.parametrize("to", ROW_DTYPES, ids=str)
def test_norms_and_gelu_write_8_bits_directly(to):
    model = make_model()
    prompt, latents = normal(1, 5, model.config.text_dim), normal(1, 4, model.config.in_channels, 4, 6)
    twin = quantized(model, to)
    with taken() as calls, torch.no_grad():
        twin(latents, torch.tensor([500.0]), prompt)
    names = [name for name, _ in calls]
    layers = len(model.blocks)
    assert (
        names.count("ada_layer_norm_quantized") == 1
        and names.count("gated_residual_ada_layer_norm_quantized") == 2 * layers - 1
    )
    assert names.count("quantize_rows") == 2 * layers  # attention's output, and the hidden layer


def video(model, order: str = "step_first", kv: str | None = None, linear: str | None = "float8_e4m3fn") -> Tensor:
    config = RolloutConfig(order=order, window_frames=6, steps=(1000, 500))
    rollout = Rollout(
        model, normal(1, 5, model.config.text_dim, seed=1), config, ExecutionConfig(kv_dtype=kv, linear_dtype=linear),
        num_latent_frames=9, latent_size=(4, 4),
    )  # fmt: skip
    return torch.cat([block.latents for block in rollout], 1)


def test_every_order_gives_the_same_video():
    model = make_model()
    first = video(model)
    for order in ("stream", "wavefront"):
        torch.testing.assert_close(video(model, order), first, rtol=1e-4, atol=1e-4)
    full = video(model, linear=None)

    def difference(other: Tensor) -> float:
        return float((other - full).square().mean().sqrt() / full.square().mean().sqrt())

    assert (
        1e-4 < difference(video(model, linear="int8")) < 0.5 * difference(first) < 0.1
    )  # 8 bits change a video a little
    assert torch.equal(full, video(model, linear=None))  # the model itself stays as it was
    both = video(model, kv="float8_e4m3fn")
    assert not torch.equal(both, first) and bool(both.isfinite().all())


def test_refusals():
    assert "linear_dtype" in (line := refusal(lambda: ExecutionConfig(linear_dtype="int4"))) and "float8_e4m3fn" in line
    model = quantized(make_model(), torch.int8)
    line = refusal(lambda: video(model, linear="float8_e4m3fn"))
    assert line == "linear_dtype: the model was loaded in int8, got float8_e4m3fn"
    assert torch.equal(video(model, linear=None), video(model, linear="int8"))
