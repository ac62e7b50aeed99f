# mypy: allow-incomplete-defs
"""ada_layer_norm in Triton: backward."""

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
    sum_partials_case,
    token_strides,
    unit_stride,
)


@triton.jit
def _ada_layer_norm_bwd_kernel(
    grad_ptr, x_ptr, scale_ptr, dx_ptr, dshift_ptr, dscale_ptr, F, tokens, groups,
    stride_gradb, stride_gradt, stride_xb, stride_xt, stride_scaleb, stride_scalef, eps,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, and the sums of a group for shift and scale; a pointer that is None is not asked for."""
    b, f, group = place(F, groups)
    cols = tl.arange(0, BLOCK_C)
    scale = tl.load(scale_ptr + b * stride_scaleb + f * stride_scalef + cols, mask=cols < C, other=0.0).to(tl.float32)
    dshift = tl.zeros((BLOCK_C,), tl.float32)
    dscale = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(group * GROUP, tl.minimum(group * GROUP + GROUP, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        rows = f * tokens + t
        live = (t < tokens)[:, None] & (cols < C)[None, :]
        x_at = x_ptr + b * stride_xb + rows[:, None] * stride_xt + cols[None, :]
        grad_at = grad_ptr + b * stride_gradb + rows[:, None] * stride_gradt + cols[None, :]
        x = tl.load(x_at, mask=live, other=0.0).to(tl.float32)
        grad = tl.load(grad_at, mask=live, other=0.0).to(tl.float32)
        xhat, rstd = normalised(x, live, eps, C)
        if dshift_ptr is not None:
            dshift += tl.sum(grad, 0)
        if dscale_ptr is not None:
            dscale += tl.sum(grad * xhat, 0)
        if dx_ptr is not None:
            dx = norm_gradient(grad * (1 + scale)[None, :], xhat, rstd, C)
            dx_rows = b * F * tokens + rows
            tl.store(dx_ptr + dx_rows[:, None] * C + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=live)
    partial = tl.program_id(0).to(tl.int64) * C + cols
    if dshift_ptr is not None:
        tl.store(dshift_ptr + partial, dshift, mask=cols < C)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + partial, dscale, mask=cols < C)


def launch(
    grads: list[Tensor], needed: list[bool], x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> list[Tensor]:
    """hiar::ada_layer_norm_backward."""
    frames = shift.shape[1]
    tokens, (group, groups) = frames_of(x, frames, "ada_layer_norm"), groups_of(x, frames, "ada_layer_norm")
    grad, x, scale_rows = unit_stride(grads[0]), unit_stride(x), unit_stride(scale)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed[0] else None
    dshift, dscale = (partial_sums(x, frames, groups) if need else None for need in needed[1:])
    with torch.cuda.device_of(x):
        _ada_layer_norm_bwd_kernel[(x.shape[0] * frames * groups,)](
            grad, x, scale_rows, dx, dshift, dscale, frames, tokens, groups, eps=eps,
            C=x.shape[2], GROUP=group, **norm_tile(x.shape[2], 4096), **UNFUSED,
            **token_strides("grad", grad), **token_strides("x", x), **frame_strides("scale", scale_rows),
        )  # fmt: skip
        sums = [None if p is None else sum_partials(p, m) for p, m in ((dshift, shift), (dscale, scale))]
    return [g for g in (dx, *sums) if g is not None]


register("ada_layer_norm_backward", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches; the same tiles serve every architecture."""
    return [
        production_case(
            name,
            _ada_layer_norm_bwd_kernel,
            "grad x dx",
            "scale dshift dscale",
            norm_tile(channels, 4096),
            fp_fusion=False,
            GROUP=FULL_GROUP,
        )
        for name, channels in WAN.items()
    ] + [sum_partials_case(name) for name in WAN]
