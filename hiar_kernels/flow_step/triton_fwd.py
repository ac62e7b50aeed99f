# mypy: allow-incomplete-defs
"""flow_step in Triton: forward."""

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
def _flow_step_fwd_kernel(
    x_ptr, velocity_ptr, sigma_ptr, next_ptr, noise_ptr, x0_ptr, out_ptr, F, n, tiles,
    stride_xb, stride_xf, stride_velocityb, stride_velocityf, stride_noiseb, stride_noisef,
    stride_sigmab, stride_sigmaf, stride_nextb, stride_nextf, BLOCK: tl.constexpr
):  # fmt: skip
    b, f, i, at, mask = piece(F, n, tiles, BLOCK)
    sigma = tl.load(sigma_ptr + b * stride_sigmab + f * stride_sigmaf).to(tl.float32)
    following = tl.load(next_ptr + b * stride_nextb + f * stride_nextf).to(tl.float32)
    x = tl.load(x_ptr + b * stride_xb + f * stride_xf + i, mask=mask).to(tl.float32)
    v = tl.load(velocity_ptr + b * stride_velocityb + f * stride_velocityf + i, mask=mask).to(tl.float32)
    x0 = x - sigma * v
    if noise_ptr is None:
        out = x + (following - sigma) * v
    else:
        noise = tl.load(noise_ptr + b * stride_noiseb + f * stride_noisef + i, mask=mask).to(tl.float32)
        out = (1 - following) * x0 + following * noise
    out = tl.where(following == 0, x0, out)  # the last step gives x0 to the bit, whatever the noise holds
    tl.store(x0_ptr + at, x0.to(x0_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """hiar::flow_step."""
    x, velocity = dense_frames(x), dense_frames(velocity)
    noise = None if noise is None else dense_frames(noise)
    x0, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    batch, frames, n = *x.shape[:2], x[0, 0].numel() if x.numel() else 0
    tiles = triton.cdiv(n, TILE["BLOCK"])
    with torch.cuda.device_of(x):
        _flow_step_fwd_kernel[(batch * frames * tiles,)](
            x, velocity, sigma, sigma_next, noise, x0, out, frames, n, tiles, **TILE,
            **strides("x", x), **strides("velocity", velocity), **strides("noise", noise),
            **strides("sigma", sigma), **strides("next", sigma_next), **FUSED,
        )  # fmt: skip
    return x0, out


register("flow_step", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches: with noise, and without."""
    kernel, constexprs = _flow_step_fwd_kernel, {"BLOCK": TILE["BLOCK"]}
    types = {a: "*bf16" if a == "velocity_ptr" else "*fp32" for a in kernel.arg_names if a.endswith("_ptr")}
    options: dict[str, Any] = {"aligned": ("stride_", "n"), "num_warps": TILE["num_warps"]}
    return [
        Case.of("sde", kernel, types, constexprs, **options),
        Case.of("ode", kernel, types, {**constexprs, "noise_ptr": None}, **options),
    ]
