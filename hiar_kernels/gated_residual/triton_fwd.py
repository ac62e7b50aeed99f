# mypy: allow-incomplete-defs
"""gated_residual in Triton: forward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compile import Case
from .._library import frames_of
from .._triton import register
from .._triton_rows import WAN, frame_strides, place, plain_tile, production_case, token_strides, unit_stride


@triton.jit
def _gated_residual_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr, F, tokens, tiles,
    stride_xb, stride_xt, stride_yb, stride_yt, stride_gateb, stride_gatef,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, f, tile = place(F, tiles)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = f * tokens + t
    live = (t < tokens)[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + b * stride_xb + rows[:, None] * stride_xt + cols[None, :], mask=live).to(tl.float32)
    y = tl.load(y_ptr + b * stride_yb + rows[:, None] * stride_yt + cols[None, :], mask=live).to(tl.float32)
    gate = tl.load(gate_ptr + b * stride_gateb + f * stride_gatef + cols, mask=cols < C).to(tl.float32)
    out = (x + gate[None, :] * y).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (b * F * tokens + rows)[:, None] * C + cols[None, :], out, mask=live)


def launch(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """hiar::gated_residual."""
    frames = gate.shape[1]
    tokens = frames_of(x, frames, "gated_residual")
    x, y, gate = unit_stride(x), unit_stride(y), unit_stride(gate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = plain_tile(x.shape[2])
    tiles = triton.cdiv(tokens, tile["BLOCK_T"])
    with torch.cuda.device_of(x):
        _gated_residual_fwd_kernel[(x.shape[0] * frames * tiles, triton.cdiv(x.shape[2], tile["BLOCK_C"]))](
            x, y, gate, out, frames, tokens, tiles, C=x.shape[2], **tile,
            **token_strides("x", x), **token_strides("y", y), **frame_strides("gate", gate),
        )  # fmt: skip
    return out


register("gated_residual", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches; the same tiles serve every architecture."""
    return [
        production_case(name, _gated_residual_fwd_kernel, "x y out", "gate", plain_tile(channels))
        for name, channels in WAN.items()
    ]
