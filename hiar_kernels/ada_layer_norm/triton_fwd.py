# mypy: allow-incomplete-defs
"""ada_layer_norm in Triton: forward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compile import Case
from .._library import frames_of
from .._triton import register
from .._triton_rows import (
    WAN,
    frame_strides,
    norm_tile,
    normalised,
    place,
    production_case,
    token_strides,
    unit_stride,
)


@triton.jit
def _ada_layer_norm_fwd_kernel(
    x_ptr, shift_ptr, scale_ptr, out_ptr, F, tokens, tiles,
    stride_xb, stride_xt, stride_shiftb, stride_shiftf, stride_scaleb, stride_scalef, eps,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, f, tile = place(F, tiles)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_C)
    rows = f * tokens + t
    live = (t < tokens)[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + b * stride_xb + rows[:, None] * stride_xt + cols[None, :], mask=live, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * stride_shiftb + f * stride_shiftf + cols, mask=cols < C, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + b * stride_scaleb + f * stride_scalef + cols, mask=cols < C, other=0.0).to(tl.float32)
    xhat, _ = normalised(x, live, eps, C)
    y = xhat * (1 + scale)[None, :] + shift[None, :]
    out_rows = b * F * tokens + rows
    tl.store(out_ptr + out_rows[:, None] * C + cols[None, :], y.to(out_ptr.dtype.element_ty), mask=live)


def launch(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """hiar::ada_layer_norm."""
    frames = shift.shape[1]
    tokens = frames_of(x, frames, "ada_layer_norm")
    x, shift, scale = unit_stride(x), unit_stride(shift), unit_stride(scale)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = norm_tile(x.shape[2], 8192, 16)
    tiles = triton.cdiv(tokens, tile["BLOCK_T"])
    with torch.cuda.device_of(x):
        _ada_layer_norm_fwd_kernel[(x.shape[0] * frames * tiles,)](
            x, shift, scale, out, frames, tokens, tiles, eps=eps, C=x.shape[2], **tile,
            **token_strides("x", x), **frame_strides("shift", shift), **frame_strides("scale", scale),
        )  # fmt: skip
    return out


register("ada_layer_norm", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches; the same tiles serve every architecture."""
    return [
        production_case(name, _ada_layer_norm_fwd_kernel, "x out", "shift scale", norm_tile(channels, 8192, 16))
        for name, channels in WAN.items()
    ]
