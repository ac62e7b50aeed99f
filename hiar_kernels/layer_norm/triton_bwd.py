# mypy: allow-incomplete-defs
"""layer_norm in Triton: backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compile import Case
from .._triton import register
from .._triton_rows import (
    FULL_GROUP,
    UNFUSED,
    WAN,
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


@triton.jit
def _layer_norm_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr, tokens, groups,
    stride_gradb, stride_gradt, stride_xb, stride_xt, eps,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, and the sums of a group for weight and bias; a pointer that is None is not asked for."""
    b, _, group = place(1, groups)
    cols = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(group * GROUP, tl.minimum(group * GROUP + GROUP, tokens), BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        live = (t < tokens)[:, None] & (cols < C)[None, :]
        x_at = x_ptr + b * stride_xb + t[:, None] * stride_xt + cols[None, :]
        grad_at = grad_ptr + b * stride_gradb + t[:, None] * stride_gradt + cols[None, :]
        x = tl.load(x_at, mask=live, other=0.0).to(tl.float32)
        grad = tl.load(grad_at, mask=live, other=0.0).to(tl.float32)
        xhat, rstd = normalised(x, live, eps, C)
        if dweight_ptr is not None:
            dweight += tl.sum(grad * xhat, 0)
        if dbias_ptr is not None:
            dbias += tl.sum(grad, 0)
        if dx_ptr is not None:
            dx = norm_gradient(grad * weight[None, :], xhat, rstd, C)
            rows = b * tokens + t
            tl.store(dx_ptr + rows[:, None] * C + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=live)
    partial = tl.program_id(0).to(tl.int64) * C + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, dweight, mask=cols < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, dbias, mask=cols < C)


def launch(
    grads: list[Tensor], needed: list[bool], x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> list[Tensor]:
    """hiar::layer_norm_backward."""
    grad, x, weight = unit_stride(grads[0]), unit_stride(x), unit_stride(weight)
    batch, tokens, channels = x.shape
    group, groups = groups_of(x, 1, "layer_norm")
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed[0] else None
    dweight, dbias = (partial_sums(x, 1, groups) if need else None for need in needed[1:])
    with torch.cuda.device_of(x):
        _layer_norm_bwd_kernel[(batch * groups,)](
            grad, x, weight, dx, dweight, dbias, tokens, groups, eps=eps,
            C=channels, GROUP=group, **norm_tile(channels, 4096), **UNFUSED,
            **token_strides("grad", grad), **token_strides("x", x),
        )  # fmt: skip
        pairs = ((dweight, weight), (dbias, bias))
        sums = [None if p is None else sum_partials(p, w.view(1, 1, -1)).view(-1) for p, w in pairs]
    return [g for g in (dx, *sums) if g is not None]


register("layer_norm_backward", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches; the same tiles serve every architecture."""
    return [
        production_case(
            name,
            _layer_norm_bwd_kernel,
            "grad x weight dx",
            "dweight dbias",
            norm_tile(channels, 4096),
            fp_fusion=False,
            GROUP=FULL_GROUP,
        )
        for name, channels in WAN.items()
    ]
