# mypy: allow-incomplete-defs
"""flow_step in Triton: backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.triton_loader import FUSED, register
from ._launch import TILE, dense_frames, piece, strides


@triton.jit
def _flow_step_bwd_kernel(
    dx0_ptr, dnext_ptr, sigma_ptr, next_ptr, dx_ptr, dvelocity_ptr, dnoise_ptr, F, n, tiles,
    stride_dx0b, stride_dx0f, stride_dnextb, stride_dnextf,
    stride_sigmab, stride_sigmaf, stride_nextb, stride_nextf, NOISY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The step is linear, so its gradient needs the noise levels alone; None: gradient not needed."""
    b, f, i, at, mask = piece(F, n, tiles, BLOCK)
    sigma = tl.load(sigma_ptr + b * stride_sigmab + f * stride_sigmaf).to(tl.float32)
    following = tl.load(next_ptr + b * stride_nextb + f * stride_nextf).to(tl.float32)
    dx0 = tl.load(dx0_ptr + b * stride_dx0b + f * stride_dx0f + i, mask=mask).to(tl.float32)
    dnext = tl.load(dnext_ptr + b * stride_dnextb + f * stride_dnextf + i, mask=mask).to(tl.float32)
    if NOISY:
        dx = dx0 + (1 - following) * dnext
        dvelocity = -sigma * dx
    else:
        dx = dx0 + dnext
        dvelocity = (following - sigma) * dnext - sigma * dx0
    if dx_ptr is not None:
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dvelocity_ptr is not None:
        tl.store(dvelocity_ptr + at, dvelocity.to(dvelocity_ptr.dtype.element_ty), mask=mask)
    if dnoise_ptr is not None:
        tl.store(dnoise_ptr + at, (following * dnext).to(dnoise_ptr.dtype.element_ty), mask=mask)


def launch(
    grads: list[Tensor], needed: list[bool], x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor,
    noise: Tensor | None
) -> list[Tensor]:  # fmt: skip
    """hiar::flow_step_backward; ``needed`` has two flags where there is no noise, three where there is."""
    dx0, dnext = (dense_frames(g) for g in grads)
    tensors = [a for a in (x, velocity, noise) if a is not None]
    gradients = [
        torch.empty(a.shape, dtype=a.dtype, device=a.device) if need else None
        for a, need in zip(tensors, needed, strict=True)
    ]
    dx, dvelocity, dnoise = gradients if noise is not None else [*gradients, None]
    batch, frames, n = *x.shape[:2], x[0, 0].numel() if x.numel() else 0
    tiles = triton.cdiv(n, TILE["BLOCK"])
    with torch.cuda.device_of(x):
        _flow_step_bwd_kernel[(batch * frames * tiles,)](
            dx0, dnext, sigma, sigma_next, dx, dvelocity, dnoise, frames, n, tiles, NOISY=noise is not None, **TILE,
            **strides("dx0", dx0), **strides("dnext", dnext), **strides("sigma", sigma), **strides("next", sigma_next),
            **FUSED,
        )  # fmt: skip
    return [g for g in gradients if g is not None]


register("flow_step_backward", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches: with noise, and without."""
    kernel, constexprs = _flow_step_bwd_kernel, {"BLOCK": TILE["BLOCK"]}
    types = {a: "*bf16" if a == "dvelocity_ptr" else "*fp32" for a in kernel.arg_names if a.endswith("_ptr")}
    options: dict[str, Any] = {"aligned": ("stride_", "n"), "num_warps": TILE["num_warps"]}
    return [
        Case.of("sde", kernel, types, {**constexprs, "NOISY": True}, **options),
        Case.of("ode", kernel, types, {**constexprs, "NOISY": False, "dnoise_ptr": None}, **options),
    ]
