# mypy: allow-incomplete-defs
"""gated_residual in Triton: backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compile import Case
from .._library import frames_of
from .._triton import architecture, register
from .._triton_rows import (
    FULL_GROUP,
    WAN,
    frame_strides,
    groups_of,
    partial_sums,
    place,
    plain_tile,
    production_case,
    sum_partials,
    token_strides,
    unit_stride,
)


@triton.jit
def _gated_residual_bwd_kernel(
    grad_ptr, y_ptr, gate_ptr, dx_ptr, dy_ptr, dgate_ptr, F, tokens, groups,
    stride_gradb, stride_gradt, stride_yb, stride_yt, stride_gateb, stride_gatef,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx (a copy: an op may not return its argument), dy, and the sums of a group for the gate; None: not asked for."""
    b, f, group = place(F, groups)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = tl.load(gate_ptr + b * stride_gateb + f * stride_gatef + cols, mask=cols < C, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(group * GROUP, tl.minimum(group * GROUP + GROUP, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        rows = f * tokens + t
        live = (t < tokens)[:, None] & (cols < C)[None, :]
        grad_at = grad_ptr + b * stride_gradb + rows[:, None] * stride_gradt + cols[None, :]
        grad = tl.load(grad_at, mask=live, other=0.0).to(tl.float32)
        out_at = (b * F * tokens + rows)[:, None] * C + cols[None, :]
        if dx_ptr is not None:
            tl.store(dx_ptr + out_at, grad.to(dx_ptr.dtype.element_ty), mask=live)
        if dy_ptr is not None:
            tl.store(dy_ptr + out_at, (gate[None, :] * grad).to(dy_ptr.dtype.element_ty), mask=live)
        if dgate_ptr is not None:
            y_at = y_ptr + b * stride_yb + rows[:, None] * stride_yt + cols[None, :]
            dgate += grad * tl.load(y_at, mask=live, other=0.0).to(tl.float32)
    if dgate_ptr is not None:
        partial = dgate_ptr + tl.program_id(0).to(tl.int64) * C + cols
        tl.store(partial, tl.sum(dgate, 0), mask=cols < C)


def _tile(channels: int, arch: int) -> dict[str, int]:
    """The tile measured on sm_90; half of it on later chips, where it spills 8 bytes with Triton 3.8 (not measured)."""
    return plain_tile(channels, 512 if arch < 100 else 256)


def launch(grads: list[Tensor], needed: list[bool], x: Tensor, y: Tensor, gate: Tensor) -> list[Tensor]:
    """hiar::gated_residual_backward."""
    frames = gate.shape[1]
    tokens, (group, groups) = frames_of(x, frames, "gated_residual"), groups_of(x, frames, "gated_residual")
    grad, y, gate_rows = unit_stride(grads[0]), unit_stride(y), unit_stride(gate)
    dx, dy = (torch.empty(a.shape, dtype=a.dtype, device=a.device) if need else None for a, need in zip((x, y), needed))
    partial = partial_sums(x, frames, groups) if needed[2] else None
    tile = _tile(x.shape[2], architecture(x))
    with torch.cuda.device_of(x):
        _gated_residual_bwd_kernel[(x.shape[0] * frames * groups, triton.cdiv(x.shape[2], tile["BLOCK_C"]))](
            grad, y, gate_rows, dx, dy, partial, frames, tokens, groups, C=x.shape[2], GROUP=group, **tile,
            **token_strides("grad", grad), **token_strides("y", y), **frame_strides("gate", gate_rows),
        )  # fmt: skip
        dgate = None if partial is None else sum_partials(partial, gate)
    return [g for g in (dx, dy, dgate) if g is not None]


register("gated_residual_backward", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches."""
    return [
        production_case(
            name, _gated_residual_bwd_kernel, "grad y dx dy", "gate dgate", _tile(channels, arch), GROUP=FULL_GROUP
        )
        for name, channels in WAN.items()
    ]
