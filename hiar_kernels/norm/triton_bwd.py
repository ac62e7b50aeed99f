# mypy: allow-incomplete-defs
"""The norm family in Triton: backward, the counterpart of the forward beside it, and the sums of groups of tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.shapes import CHANNELS
from ..common.torch_library import frames_of
from ..common.triton_loader import FUSED, UNFUSED, architecture, register
from .inputs import ARGUMENTS, OPTIONAL_GATE, NormInputs
from .tiles import (
    FULL_GROUP,
    frame_strides,
    frame_vectors,
    groups_of,
    norm_gradient,
    norm_tile,
    normalise,
    partial_sums,
    plain_tile,
    production_case,
    tile_of_program,
    token_strides,
    unit_stride,
)

_SUM_TILE = {"BLOCK_G": 32, "BLOCK_C": 64, "num_warps": 4}
_IN_KERNEL = {"weight": "scale", "bias": "shift"}  # an argument of an op -> its name in the kernel


@triton.jit
def _norm_bwd_kernel(
    dh_ptr, grad_ptr, x_ptr, y_ptr, gate_ptr, scale_ptr, dx_ptr, dy_ptr, dgate_ptr, dshift_ptr, dscale_ptr,
    F, tokens, groups, stride_dhb, stride_dht, stride_gradb, stride_gradt, stride_xb, stride_xt, stride_yb, stride_yt,
    stride_gateb, stride_gatef, stride_scaleb, stride_scalef, eps,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    PER_FRAME: tl.constexpr, RMS: tl.constexpr
):  # fmt: skip
    """dx, dy, and the sums of a group for gate, shift and scale; a pointer that is None is not needed."""
    b, f, group = tile_of_program(F, groups)
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    scale = tl.load(scale_ptr + b * stride_scaleb + f * stride_scalef + cols, mask=inside, other=0.0).to(tl.float32)
    gate_at = None if gate_ptr is None else gate_ptr + b * stride_gateb + f * stride_gatef + cols
    dgate = tl.zeros((BLOCK_C,), tl.float32)
    dshift = tl.zeros((BLOCK_C,), tl.float32)
    dscale = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(group * GROUP, tl.minimum(group * GROUP + GROUP, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        rows = f * tokens + t
        mask = (t < tokens)[:, None] & inside[None, :]
        x_at = x_ptr + b * stride_xb + rows[:, None] * stride_xt + cols[None, :]
        y_at = None if y_ptr is None else y_ptr + b * stride_yb + rows[:, None] * stride_yt + cols[None, :]
        grad_at = grad_ptr + b * stride_gradb + rows[:, None] * stride_gradt + cols[None, :]
        h = tl.load(x_at, mask=mask, other=0.0)
        if y_ptr is not None:
            y = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
            if gate_ptr is not None:
                y = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)[None, :] * y
            h = (h.to(tl.float32) + y).to(h.dtype)  # rounded as the forward did
        grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
        xhat, factor = normalise(h.to(tl.float32), mask, eps, C, RMS)
        if dshift_ptr is not None:
            dshift += tl.sum(grad, 0)
        if dscale_ptr is not None:
            dscale += tl.sum(grad * xhat, 0)
        if dx_ptr is not None or dy_ptr is not None or dgate_ptr is not None:
            g = grad * ((1 + scale) if PER_FRAME else scale)[None, :]
            dx = norm_gradient(g, xhat, factor, C, RMS)
            if dh_ptr is not None:
                dh_at = dh_ptr + b * stride_dhb + rows[:, None] * stride_dht + cols[None, :]
                dx += tl.load(dh_at, mask=mask, other=0.0).to(tl.float32)
            out_at = (b * F * tokens + rows)[:, None] * C + cols[None, :]
            if dx_ptr is not None:
                tl.store(dx_ptr + out_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if dy_ptr is not None:
                dy = dx
                if gate_ptr is not None:  # again: kept in registers, it would spill in wide rows, as y below
                    dy = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)[None, :] * dx
                tl.store(dy_ptr + out_at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
            if dgate_ptr is not None:
                y = tl.load(y_at, mask=mask, other=0.0).to(
                    tl.float32
                )  # again: in registers it would spill in wide rows
                dgate += tl.sum(dx * y, 0)
    partial = tl.program_id(0).to(tl.int64) * C + cols
    if dgate_ptr is not None:
        tl.store(dgate_ptr + partial, dgate, mask=inside)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + partial, dshift, mask=inside)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + partial, dscale, mask=inside)


@triton.jit
def _gated_residual_bwd_kernel(
    grad_ptr, y_ptr, gate_ptr, dx_ptr, dy_ptr, dgate_ptr, F, tokens, groups,
    stride_gradb, stride_gradt, stride_yb, stride_yt, stride_gateb, stride_gatef,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """dx (a copy: an op may not return its argument), dy, and the sums of a group for the gate; None: not needed."""
    b, f, group = tile_of_program(F, groups)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = tl.load(gate_ptr + b * stride_gateb + f * stride_gatef + cols, mask=cols < C, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(group * GROUP, tl.minimum(group * GROUP + GROUP, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        rows = f * tokens + t
        mask = (t < tokens)[:, None] & (cols < C)[None, :]
        grad_at = grad_ptr + b * stride_gradb + rows[:, None] * stride_gradt + cols[None, :]
        grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
        out_at = (b * F * tokens + rows)[:, None] * C + cols[None, :]
        if dx_ptr is not None:
            tl.store(dx_ptr + out_at, grad.to(dx_ptr.dtype.element_ty), mask=mask)
        if dy_ptr is not None:
            tl.store(dy_ptr + out_at, (gate[None, :] * grad).to(dy_ptr.dtype.element_ty), mask=mask)
        if dgate_ptr is not None:
            y_at = y_ptr + b * stride_yb + rows[:, None] * stride_yt + cols[None, :]
            dgate += grad * tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
    if dgate_ptr is not None:
        partial = dgate_ptr + tl.program_id(0).to(tl.int64) * C + cols
        tl.store(partial, tl.sum(dgate, 0), mask=cols < C)


@triton.jit
def _sum_partials_kernel(
    partial_ptr, out_ptr, F, groups, summands,
    C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """out[row] = sum of the ``summands`` groups of a row: those of one video, or of all where they share the row."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, f = (row // F).to(tl.int64), (row % F).to(tl.int64)
    acc = tl.zeros((BLOCK_G, BLOCK_C), tl.float32)
    for start in range(0, summands, BLOCK_G):
        n = start + tl.arange(0, BLOCK_G)
        at = ((first + n // groups) * F + f) * groups + n % groups
        mask = (n < summands)[:, None] & (cols < C)[None, :]
        acc += tl.load(partial_ptr + at[:, None] * C + cols[None, :], mask=mask, other=0.0)
    sums = tl.sum(acc, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * C + cols, sums, mask=cols < C)


def sum_partials(partial: Tensor, like: Tensor) -> Tensor:
    """Partial sums [B, F, G, C] -> gradient of ``like`` [B or 1, F, C], contiguous, in its dtype."""
    batch, frames, groups, channels = partial.shape
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    summands = groups if like.shape[0] == batch else batch * groups
    grid = (like.shape[0] * frames, triton.cdiv(channels, _SUM_TILE["BLOCK_C"]))
    _sum_partials_kernel[grid](partial, out, frames, groups, summands, C=channels, **_SUM_TILE, **FUSED)
    return out


def _sum_vector(partial: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Partial sums -> gradient of gate, shift or scale [B or 1, F, C], or of an affine vector [C]: over all frames."""
    if partial is None or like is None:
        return None
    if like.dim() == 3:
        return sum_partials(partial, like)
    return sum_partials(partial.flatten(0, 1)[:, None], like.view(1, 1, -1)).view(-1)


def _norm_tile(channels: int, residual: bool, rms: bool) -> dict[str, int]:
    # with 8 warps ptxas keeps RMSNorm's rows of 5120 to 128 registers and spills (sm_100, Triton 3.7)
    return norm_tile(channels, 2048 if residual else 4096, 16 if rms else 8)


def _residual_tile(channels: int, arch: int) -> dict[str, int]:
    """The tile measured on sm_90; half of it on later chips, where it spills 8 bytes with Triton 3.8 (not measured)."""
    return plain_tile(channels, 512 if arch < 100 else 256)


def launch(op: str, grads: list[Tensor], needed: list[bool], *arguments: Tensor | float | None) -> list[Tensor]:
    """hiar::<op>_backward: the gradients that are needed, in the order of the arguments."""
    inputs = NormInputs.from_schema(op, *arguments)
    tensors = {name: getattr(inputs, name) for name in ARGUMENTS[op] if getattr(inputs, name) is not None}
    names = [name for name, need in zip(tensors, needed, strict=True) if need]
    batch, _, channels = inputs.x.shape
    frames, tokens = inputs.frames, frames_of(inputs.x, inputs.frames, op)
    group, groups = groups_of(inputs.x, frames, op)
    x, y = unit_stride(inputs.x), None if inputs.y is None else unit_stride(inputs.y)
    gate, _, scale = frame_vectors(inputs)
    results: dict[str, Tensor | None] = {
        name: torch.empty(x.shape, dtype=tensors[name].dtype, device=x.device) for name in names if name in ("x", "y")
    }
    partials = {_IN_KERNEL.get(n, n): partial_sums(x, frames, groups) for n in names if n not in ("x", "y")}
    grad = unit_stride(grads[-1])
    with torch.cuda.device_of(x):
        if inputs.eps is None:
            tile = _residual_tile(channels, architecture(x))
            _gated_residual_bwd_kernel[(batch * frames * groups, triton.cdiv(channels, tile["BLOCK_C"]))](
                grad, y, gate, results.get("x"), results.get("y"), partials.get("gate"), frames, tokens, groups,
                C=channels, GROUP=group, **tile, **token_strides("grad", grad), **token_strides("y", y),
                **frame_strides("gate", gate), **FUSED,
            )  # fmt: skip
        else:
            dh = None if y is None else unit_stride(grads[0])
            # Unfused: a product that is summed rounded and subtracted from unrounded (a contracted a * b - sum) leaves
            # its rounding error times 1 / standard deviation: 1e-5 where all terms cancel, in rows of one channel. It
            # costs 7 to 14% more instructions on sm_90, in kernels that wait for memory.
            _norm_bwd_kernel[(batch * frames * groups,)](
                dh, grad, x, y, gate, scale, results.get("x"), results.get("y"),
                *(partials.get(name) for name in ("gate", "shift", "scale")), frames, tokens, groups, eps=inputs.eps,
                C=channels, GROUP=group, PER_FRAME=inputs.scale is not None, RMS=inputs.rms,
                **_norm_tile(channels, y is not None, inputs.rms), **UNFUSED, **token_strides("dh", dh),
                **token_strides("grad", grad), **token_strides("x", x), **token_strides("y", y),
                **frame_strides("gate", gate), **frame_strides("scale", scale),
            )  # fmt: skip
        for name in names:
            if name not in results:
                results[name] = _sum_vector(partials[_IN_KERNEL.get(name, name)], tensors[name])
    return [g for name in names if (g := results[name]) is not None]


for _op in ARGUMENTS:
    register(f"{_op}_backward", partial(launch, _op))


def _cases(op: str, arch: int, gated: bool = True) -> list[Case]:
    names, label = ARGUMENTS[op], f"{op}{'' if gated else ' without a gate'}, "
    if op == "gated_residual":
        return [
            production_case(
                label, _gated_residual_bwd_kernel, c, "grad y dx dy", "gate dgate", _residual_tile(c, arch),
                GROUP=FULL_GROUP
            )
            for c in CHANNELS
        ]  # fmt: skip
    per_frame, residual, rms = "scale" in names, "y" in names, "bias" not in names and "weight" in names
    narrow = "grad x dx" + (" dh y dy" if residual else "") + ("" if per_frame else " scale")
    wide = ("scale " if per_frame else "") + ("gate dgate " if "gate" in names and gated else "")
    wide += "dscale" if rms else "dshift dscale"
    constexprs: dict[str, Any] = {"GROUP": FULL_GROUP, "PER_FRAME": per_frame, "RMS": rms}
    return [
        production_case(
            label, _norm_bwd_kernel, c, narrow, wide, _norm_tile(c, residual, rms), fp_fusion=False, **constexprs
        )
        for c in CHANNELS
    ]


def compile_cases(arch: int) -> list[Case]:
    """Every op in bfloat16 with every gradient needed, what belongs to frames in float32; and the sums of groups."""
    cases = [case for op in ARGUMENTS for case in _cases(op, arch)] + _cases(OPTIONAL_GATE, arch, gated=False)
    return cases + [production_case("", _sum_partials_kernel, c, "", "partial out", _SUM_TILE) for c in CHANNELS]
