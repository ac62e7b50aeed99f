# mypy: allow-incomplete-defs
"""gated_residual_ada_layer_norm in Triton: backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compile import Case
from .._library import frames_of
from .._triton import register
from .._triton_rows import (
    FULL_GROUP,
    UNFUSED,
    WAN,
    frame_strides,
    groups_of,
    norm_gradient,
    norm_tile,
    normalised,
    partial_sums,
    place,
    production_case,
    sum_partials,
    token_strides,
    unit_stride,
)

_OP = "gated_residual_ada_layer_norm"


@triton.jit
def _gated_residual_ada_layer_norm_bwd_kernel(
    dh_ptr, grad_ptr, x_ptr, y_ptr, gate_ptr, scale_ptr, dx_ptr, dy_ptr, dgate_ptr, dshift_ptr, dscale_ptr,
    F, tokens, groups, stride_dhb, stride_dht, stride_gradb, stride_gradt, stride_xb, stride_xt, stride_yb, stride_yt,
    stride_gateb, stride_gatef, stride_scaleb, stride_scalef, eps,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, dy, and the sums of a group for gate, shift and scale; a pointer that is None is not asked for."""
    b, f, group = place(F, groups)
    cols = tl.arange(0, BLOCK_C)
    some = cols < C
    gate = tl.load(gate_ptr + b * stride_gateb + f * stride_gatef + cols, mask=some, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + b * stride_scaleb + f * stride_scalef + cols, mask=some, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK_C,), tl.float32)
    dshift = tl.zeros((BLOCK_C,), tl.float32)
    dscale = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(group * GROUP, tl.minimum(group * GROUP + GROUP, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        rows = f * tokens + t
        live = (t < tokens)[:, None] & some[None, :]
        x_at = x_ptr + b * stride_xb + rows[:, None] * stride_xt + cols[None, :]
        y_at = y_ptr + b * stride_yb + rows[:, None] * stride_yt + cols[None, :]
        grad_at = grad_ptr + b * stride_gradb + rows[:, None] * stride_gradt + cols[None, :]
        x = tl.load(x_at, mask=live, other=0.0)
        y = tl.load(y_at, mask=live, other=0.0).to(tl.float32)
        grad = tl.load(grad_at, mask=live, other=0.0).to(tl.float32)
        h = (x.to(tl.float32) + gate[None, :] * y).to(x.dtype)  # rounded as the forward did
        xhat, rstd = normalised(h.to(tl.float32), live, eps, C)
        if dshift_ptr is not None:
            dshift += tl.sum(grad, 0)
        if dscale_ptr is not None:
            dscale += tl.sum(grad * xhat, 0)
        if dx_ptr is not None or dy_ptr is not None or dgate_ptr is not None:
            dh_at = dh_ptr + b * stride_dhb + rows[:, None] * stride_dht + cols[None, :]
            dx = norm_gradient(grad * (1 + scale)[None, :], xhat, rstd, C)
            dx += tl.load(dh_at, mask=live, other=0.0).to(tl.float32)
            out_at = (b * F * tokens + rows)[:, None] * C + cols[None, :]
            if dx_ptr is not None:
                tl.store(dx_ptr + out_at, dx.to(dx_ptr.dtype.element_ty), mask=live)
            if dy_ptr is not None:
                tl.store(dy_ptr + out_at, (gate[None, :] * dx).to(dy_ptr.dtype.element_ty), mask=live)
            if dgate_ptr is not None:
                y = tl.load(y_at, mask=live, other=0.0).to(tl.float32)  # again: kept, it would spill in wide rows
                dgate += tl.sum(dx * y, 0)
    partial = tl.program_id(0).to(tl.int64) * C + cols
    if dgate_ptr is not None:
        tl.store(dgate_ptr + partial, dgate, mask=some)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + partial, dshift, mask=some)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + partial, dscale, mask=some)


def launch(
    grads: list[Tensor], needed: list[bool], x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
    eps: float,
) -> list[Tensor]:  # fmt: skip
    """hiar::gated_residual_ada_layer_norm_backward."""
    frames = gate.shape[1]
    tokens, (group, groups) = frames_of(x, frames, _OP), groups_of(x, frames, _OP)
    dh, grad, x, y, gate_rows, scale_rows = (unit_stride(a) for a in (*grads, x, y, gate, scale))
    dx, dy = (torch.empty(a.shape, dtype=a.dtype, device=a.device) if need else None for a, need in zip((x, y), needed))
    partials = [partial_sums(x, frames, groups) if need else None for need in needed[2:]]
    with torch.cuda.device_of(x):
        _gated_residual_ada_layer_norm_bwd_kernel[(x.shape[0] * frames * groups,)](
            dh, grad, x, y, gate_rows, scale_rows, dx, dy, *partials, frames, tokens, groups, eps=eps,
            C=x.shape[2], GROUP=group, **norm_tile(x.shape[2], 2048), **UNFUSED,
            **token_strides("dh", dh), **token_strides("grad", grad), **token_strides("x", x), **token_strides("y", y),
            **frame_strides("gate", gate_rows), **frame_strides("scale", scale_rows),
        )  # fmt: skip
        sums = [None if p is None else sum_partials(p, m) for p, m in zip(partials, (gate, shift, scale))]
    return [g for g in (dx, dy, *sums) if g is not None]


register(f"{_OP}_backward", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches; the same tiles serve every architecture."""
    return [
        production_case(
            name,
            _gated_residual_ada_layer_norm_bwd_kernel,
            "dh grad x y dx dy",
            "gate scale dgate dshift dscale",
            norm_tile(channels, 2048),
            fp_fusion=False,
            GROUP=FULL_GROUP,
        )
        for name, channels in WAN.items()
    ]
