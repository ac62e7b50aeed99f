# mypy: allow-incomplete-defs
"""gated_residual_ada_layer_norm in Triton: forward."""

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

_OP = "gated_residual_ada_layer_norm"


@triton.jit
def _gated_residual_ada_layer_norm_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, h_ptr, out_ptr, F, tokens, tiles,
    stride_xb, stride_xt, stride_yb, stride_yt, stride_gateb, stride_gatef,
    stride_shiftb, stride_shiftf, stride_scaleb, stride_scalef, eps,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, f, tile = place(F, tiles)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_C)
    some = cols < C
    rows = f * tokens + t
    live = (t < tokens)[:, None] & some[None, :]
    x = tl.load(x_ptr + b * stride_xb + rows[:, None] * stride_xt + cols[None, :], mask=live, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + b * stride_yb + rows[:, None] * stride_yt + cols[None, :], mask=live, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + b * stride_gateb + f * stride_gatef + cols, mask=some, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * stride_shiftb + f * stride_shiftf + cols, mask=some, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + b * stride_scaleb + f * stride_scalef + cols, mask=some, other=0.0).to(tl.float32)
    h = (x + gate[None, :] * y).to(h_ptr.dtype.element_ty)
    out_at = (b * F * tokens + rows)[:, None] * C + cols[None, :]
    tl.store(h_ptr + out_at, h, mask=live)
    xhat, _ = normalised(h.to(tl.float32), live, eps, C)  # of what was stored: fused or not, the same numbers
    out = xhat * (1 + scale)[None, :] + shift[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=live)


def launch(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """hiar::gated_residual_ada_layer_norm."""
    frames = gate.shape[1]
    tokens = frames_of(x, frames, _OP)
    x, y, gate, shift, scale = (unit_stride(a) for a in (x, y, gate, shift, scale))
    h, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    tile = norm_tile(x.shape[2], 8192)
    tiles = triton.cdiv(tokens, tile["BLOCK_T"])
    with torch.cuda.device_of(x):
        _gated_residual_ada_layer_norm_fwd_kernel[(x.shape[0] * frames * tiles,)](
            x, y, gate, shift, scale, h, out, frames, tokens, tiles, eps=eps, C=x.shape[2], **tile,
            **token_strides("x", x), **token_strides("y", y), **frame_strides("gate", gate),
            **frame_strides("shift", shift), **frame_strides("scale", scale),
        )  # fmt: skip
    return h, out


register(_OP, launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches; the same tiles serve every architecture."""
    return [
        production_case(
            name, _gated_residual_ada_layer_norm_fwd_kernel, "x y h out", "gate shift scale", norm_tile(channels, 8192)
        )
        for name, channels in WAN.items()
    ]
