# mypy: allow-incomplete-defs
"""layer_norm in Triton: forward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compile import Case
from .._triton import register
from .._triton_rows import WAN, norm_tile, normalised, place, production_case, token_strides, unit_stride


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, tokens, tiles, stride_xb, stride_xt, eps,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, _, tile = place(1, tiles)
    t = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    live = (t < tokens)[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + b * stride_xb + t[:, None] * stride_xt + cols[None, :], mask=live, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    xhat, _ = normalised(x, live, eps, C)
    y = xhat * weight[None, :] + bias[None, :]
    rows = b * tokens + t
    tl.store(out_ptr + rows[:, None] * C + cols[None, :], y.to(out_ptr.dtype.element_ty), mask=live)


def launch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """hiar::layer_norm."""
    x, weight, bias = unit_stride(x), unit_stride(weight), unit_stride(bias)
    batch, tokens, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = norm_tile(channels, 8192)
    tiles = triton.cdiv(tokens, tile["BLOCK_T"])
    with torch.cuda.device_of(x):
        _layer_norm_fwd_kernel[(batch * tiles,)](
            x, weight, bias, out, tokens, tiles, eps=eps, C=channels, **tile, **token_strides("x", x)
        )
    return out


register("layer_norm", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches; the same tiles serve every architecture."""
    return [
        production_case(name, _layer_norm_fwd_kernel, "x weight bias out", "", norm_tile(channels, 8192))
        for name, channels in WAN.items()
    ]
