# mypy: allow-incomplete-defs
"""The norms in Triton: one kernel for each direction, and what an op leaves out is compiled out.

h   = x + gate y                                   y: a residual or None; gate: of each frame, None: 1
n   = (h - mean) / sqrt(var + eps)                 or, RMS, h / sqrt(mean(h^2) + eps)
out = n (1 + scale) + shift                        of each frame; or, affine, n scale + shift, one for all tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._compile import Case
from ._library import frames_of
from ._triton_rows import (
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


@triton.jit
def _normed(h, live, eps, C: tl.constexpr, RMS: tl.constexpr):
    """Normed rows and the factor that normed them; h [BLOCK_T, BLOCK_C] is 0 where not live."""
    if RMS:
        factor = tl.rsqrt(tl.sum(h * h, 1) / C + eps)
        xhat = h * factor[:, None]
    else:
        xhat, factor = normalised(h, live, eps, C)
    return xhat, factor


@triton.jit
def _norm_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, h_ptr, out_ptr, F, tokens, tiles,
    stride_xb, stride_xt, stride_yb, stride_yt, stride_gateb, stride_gatef,
    stride_shiftb, stride_shiftf, stride_scaleb, stride_scalef, eps,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PER_FRAME: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    b, f, tile = place(F, tiles)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_C)
    some = cols < C
    rows = f * tokens + t
    live = (t < tokens)[:, None] & some[None, :]
    out_at = (b * F * tokens + rows)[:, None] * C + cols[None, :]
    h = tl.load(x_ptr + b * stride_xb + rows[:, None] * stride_xt + cols[None, :], mask=live, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y_at = y_ptr + b * stride_yb + rows[:, None] * stride_yt + cols[None, :]
        y = tl.load(y_at, mask=live, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + b * stride_gateb + f * stride_gatef + cols, mask=some, other=0.0).to(tl.float32)
            y = gate[None, :] * y
        rounded = (h + y).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + out_at, rounded, mask=live)
        h = rounded.to(tl.float32)  # the norm is that of what was stored: fused or not, the same numbers
    scale = tl.load(scale_ptr + b * stride_scaleb + f * stride_scalef + cols, mask=some, other=0.0).to(tl.float32)
    xhat, _ = _normed(h, live, eps, C, RMS)
    out = xhat * ((1 + scale) if PER_FRAME else scale)[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + b * stride_shiftb + f * stride_shiftf + cols, mask=some, other=0.0).to(tl.float32)
        out += shift[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _norm_bwd_kernel(
    dh_ptr, grad_ptr, x_ptr, y_ptr, gate_ptr, scale_ptr, dx_ptr, dy_ptr, dgate_ptr, dshift_ptr, dscale_ptr,
    F, tokens, groups, stride_dhb, stride_dht, stride_gradb, stride_gradt, stride_xb, stride_xt, stride_yb, stride_yt,
    stride_gateb, stride_gatef, stride_scaleb, stride_scalef, eps,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    PER_FRAME: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """dx, dy, and the sums of a group for gate, shift and scale; a pointer that is None is not asked for."""
    b, f, group = place(F, groups)
    cols = tl.arange(0, BLOCK_C)
    some = cols < C
    scale = tl.load(scale_ptr + b * stride_scaleb + f * stride_scalef + cols, mask=some, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + b * stride_gateb + f * stride_gatef + cols, mask=some, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK_C,), tl.float32)
    dshift = tl.zeros((BLOCK_C,), tl.float32)
    dscale = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(group * GROUP, tl.minimum(group * GROUP + GROUP, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        rows = f * tokens + t
        live = (t < tokens)[:, None] & some[None, :]
        x_at = x_ptr + b * stride_xb + rows[:, None] * stride_xt + cols[None, :]
        y_at = None if y_ptr is None else y_ptr + b * stride_yb + rows[:, None] * stride_yt + cols[None, :]
        grad_at = grad_ptr + b * stride_gradb + rows[:, None] * stride_gradt + cols[None, :]
        h = tl.load(x_at, mask=live, other=0.0)
        if y_ptr is not None:
            y = tl.load(y_at, mask=live, other=0.0).to(tl.float32)
            if gate_ptr is not None:
                y = gate[None, :] * y
            h = (h.to(tl.float32) + y).to(h.dtype)  # rounded as the forward did
        grad = tl.load(grad_at, mask=live, other=0.0).to(tl.float32)
        xhat, factor = _normed(h.to(tl.float32), live, eps, C, RMS)
        if dshift_ptr is not None:
            dshift += tl.sum(grad, 0)
        if dscale_ptr is not None:
            dscale += tl.sum(grad * xhat, 0)
        if dx_ptr is not None or dy_ptr is not None or dgate_ptr is not None:
            g = grad * ((1 + scale) if PER_FRAME else scale)[None, :]
            if RMS:
                dx = (g - xhat * (tl.sum(g * xhat, 1) / C)[:, None]) * factor[:, None]
            else:
                dx = norm_gradient(g, xhat, factor, C)
            if dh_ptr is not None:
                dh_at = dh_ptr + b * stride_dhb + rows[:, None] * stride_dht + cols[None, :]
                dx += tl.load(dh_at, mask=live, other=0.0).to(tl.float32)
            out_at = (b * F * tokens + rows)[:, None] * C + cols[None, :]
            if dx_ptr is not None:
                tl.store(dx_ptr + out_at, dx.to(dx_ptr.dtype.element_ty), mask=live)
            if dy_ptr is not None:
                dy = dx if gate_ptr is None else gate[None, :] * dx
                tl.store(dy_ptr + out_at, dy.to(dy_ptr.dtype.element_ty), mask=live)
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


def _frames(scale: Tensor, gate: Tensor | None) -> int:
    """Frames of x [B, F P, C]: 1 where nothing belongs to a frame."""
    return gate.shape[1] if gate is not None else scale.shape[1] if scale.dim() == 3 else 1


def _per_frame(m: Tensor | None, frames: int) -> Tensor | None:
    """[B or 1, F, C] of [B or 1, F, C] or [C], dense along C."""
    return m if m is None else unit_stride(m if m.dim() == 3 else m.expand(1, frames, -1))


def _token_strides(name: str, x: Tensor | None) -> dict[str, int]:
    return {f"stride_{name}b": 0, f"stride_{name}t": 0} if x is None else token_strides(name, x)


def _frame_strides(name: str, m: Tensor | None) -> dict[str, int]:
    return {f"stride_{name}b": 0, f"stride_{name}f": 0} if m is None else frame_strides(name, m)


def _forward_tile(channels: int, frames_vectors: bool, residual: bool) -> dict[str, int]:
    # with a residual two rows of 1536 to a program: 17.3 us for 17.5 with four, 18.5 to 24 with others (H200)
    return norm_tile(channels, 4096 if residual else 8192, 16 if frames_vectors and not residual else 8)


def _backward_tile(channels: int, residual: bool, rms: bool) -> dict[str, int]:
    # with 8 warps ptxas keeps RMSNorm's rows of 5120 to 128 registers and spills (sm_100, Triton 3.7)
    return norm_tile(channels, 2048 if residual else 4096, 16 if rms else 8)


def forward(
    op: str,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """(h, out) of an op; without y h is x. scale, shift: [B or 1, F, C] of frames, or affine [C]; gate of frames."""
    per_frame, frames = scale.dim() == 3, _frames(scale, gate)
    tokens = frames_of(x, frames, op)
    x, y = unit_stride(x), None if y is None else unit_stride(y)
    gate, shift, rows = (_per_frame(m, frames) for m in (gate, shift, scale))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = None if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _forward_tile(x.shape[2], per_frame, y is not None)
    tiles = triton.cdiv(tokens, tile["BLOCK_T"])
    with torch.cuda.device_of(x):
        _norm_fwd_kernel[(x.shape[0] * frames * tiles,)](
            x, y, gate, shift, rows, h, out, frames, tokens, tiles, eps=eps, C=x.shape[2], PER_FRAME=per_frame,
            RMS=rms, **tile, **_token_strides("x", x), **_token_strides("y", y), **_frame_strides("gate", gate),
            **_frame_strides("shift", shift), **_frame_strides("scale", rows),
        )  # fmt: skip
    return x if h is None else h, out


def backward(
    op: str,
    grads: Sequence[Tensor],
    needed: Mapping[str, bool],
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    rms: bool = False,
) -> list[Tensor]:
    """Gradients that are ``needed`` of "x", "y", "gate", "shift", "scale", in the order given there.

    ``grads``: of h and out where there is a residual, else of out.
    """
    per_frame, frames = scale.dim() == 3, _frames(scale, gate)
    tokens, (group, groups) = frames_of(x, frames, op), groups_of(x, frames, op)
    grad, dh = unit_stride(grads[-1]), None if y is None else unit_stride(grads[0])
    x, y_rows = unit_stride(x), None if y is None else unit_stride(y)
    gate_rows, scale_rows = _per_frame(gate, frames), _per_frame(scale, frames)
    found: dict[str, Tensor | None] = {}
    for name, like in (("x", x), ("y", y)):
        found[name] = None
        if like is not None and needed.get(name):
            found[name] = torch.empty(x.shape, dtype=like.dtype, device=x.device)
    vectors = {"gate": gate, "shift": shift, "scale": scale}
    partials = {name: partial_sums(x, frames, groups) if needed.get(name) else None for name in vectors}
    with torch.cuda.device_of(x):
        _norm_bwd_kernel[(x.shape[0] * frames * groups,)](
            dh, grad, x, y_rows, gate_rows, scale_rows, found["x"], found["y"], *partials.values(), frames, tokens,
            groups, eps=eps, C=x.shape[2], GROUP=group, PER_FRAME=per_frame, RMS=rms,
            **_backward_tile(x.shape[2], y is not None, rms), **UNFUSED, **_token_strides("dh", dh),
            **_token_strides("grad", grad), **_token_strides("x", x), **_token_strides("y", y_rows),
            **_frame_strides("gate", gate_rows), **_frame_strides("scale", scale_rows),
        )  # fmt: skip
        for name, m in vectors.items():
            found[name] = _summed(partials[name], m)
    return [found[name] for name, need in needed.items() if need]  # type: ignore[misc]


def _summed(partial: Tensor | None, like: Tensor | None) -> Tensor | None:
    if partial is None or like is None:
        return None
    if like.dim() == 3:
        return sum_partials(partial, like)
    return sum_partials(partial.flatten(0, 1)[:, None], like.view(1, 1, -1)).view(-1)  # affine: over all frames


def forward_cases(narrow: str, wide: str, per_frame: bool = False, rms: bool = False, label: str = "") -> list[Case]:
    """Production launches with these pointers (without ``_ptr``) in bfloat16 and float32, the others None; the same
    tiles serve every architecture.
    """
    residual = "y" in narrow.split()
    tiles = {name: _forward_tile(channels, per_frame, residual) for name, channels in WAN.items()}
    return _cases(_norm_fwd_kernel, narrow, wide, tiles, label, PER_FRAME=per_frame, RMS=rms)


def backward_cases(narrow: str, wide: str, per_frame: bool = False, rms: bool = False, label: str = "") -> list[Case]:
    """As :func:`forward_cases`, with every gradient asked for."""
    residual = "y" in narrow.split()
    tiles = {name: _backward_tile(channels, residual, rms) for name, channels in WAN.items()}
    constexprs = {"GROUP": FULL_GROUP, "PER_FRAME": per_frame, "RMS": rms}
    return _cases(_norm_bwd_kernel, narrow, wide, tiles, label, fp_fusion=False, **constexprs)


def _cases(
    kernel: Any, narrow: str, wide: str, tiles: dict[str, dict[str, int]], label: str, **constexprs: Any
) -> list[Case]:
    given = {f"{name}_ptr" for name in f"{narrow} {wide}".split()}
    absent: dict[str, Any] = dict.fromkeys(a for a in kernel.arg_names if a.endswith("_ptr") and a not in given)
    found = [production_case(name, kernel, narrow, wide, tile, **absent, **constexprs) for name, tile in tiles.items()]
    return [replace(case, name=case.name + label) for case in found]
