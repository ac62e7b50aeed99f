# mypy: allow-incomplete-defs
"""Gradients of qk_norm_rope in Triton: to qkv (zero in its v third) and to both weights, without atomics.

A program walks through some tokens in order, writes their gradients and keeps its share of the weight gradient in
registers; a second kernel adds the shares, always in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.shapes import HEAD_DIM, HEADS
from ..common.triton_loader import FUSED, register
from .inputs import RopeInputs, turns_of
from .triton_fwd import cos_sin, inverse_rms, row_strides, tile, turn

MOST_SHARES = 2048  # of a weight gradient; 16 bytes of them for each row of 7 C bf16 numbers at 16 rows a program
FEWEST_ROWS = 16
SUM_TILE = {"BLOCK_N": 32, "BLOCK_C": 64}


@triton.jit
def _backward_of_one(
    x_ptr, g_ptr, dx_ptr, weight_ptr, share_ptr, frames_ptr, turns_ptr,
    stride_xb, stride_xt, stride_fb, stride_ff, tokens, frame_tokens, first_cell, columns, first, last, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr
):  # fmt: skip
    """q or k of the rows first to last - 1 of [B T]; x_ptr and dx_ptr point at its third of qkv."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    h = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (h < HEADS) & (d < HEAD_DIM)
    at = h * HEAD_DIM + d
    weight = tl.load(weight_ptr + at, mask=inside, other=0).to(tl.float32)
    share = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for i in range(0, last - first):
        row = first + i
        batch, token = (row // tokens).to(tl.int64), row % tokens
        frame, place = (token // frame_tokens).to(tl.int64), first_cell + token % frame_tokens
        from_ptr = x_ptr + batch * stride_xb + token.to(tl.int64) * stride_xt
        x = tl.load(from_ptr + at, mask=inside, other=0).to(tl.float32)
        g = tl.load(g_ptr + row.to(tl.int64) * WIDTH + at, mask=inside, other=0).to(tl.float32)
        frame_id = tl.load(frames_ptr + batch * stride_fb + frame * stride_ff).to(tl.int64)
        cos, sin = cos_sin(turns_ptr, frame_id, place // columns, place % columns, HEAD_DIM, BLOCK_D)
        g = turn(g, cos, -sin, BLOCK_H, BLOCK_D)  # turned back
        scale = inverse_rms(x, eps, WIDTH)
        normed = x * scale
        if NEED_WEIGHT:
            share += g * normed
        if NEED_X:
            g = g * weight
            along = tl.sum(tl.sum(g * normed, 1), 0) / WIDTH
            dx = (g - normed * along) * scale
            tl.store(dx_ptr + row.to(tl.int64) * (3 * WIDTH) + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if NEED_WEIGHT:
        tl.store(share_ptr + at, share, mask=inside)


@triton.jit
def _qk_norm_rope_bwd_kernel(
    qkv_ptr, gq_ptr, gk_ptr, dqkv_ptr, q_weight_ptr, k_weight_ptr, shares_ptr, frames_ptr, turns_ptr,
    stride_xb, stride_xt, stride_fb, stride_ff, batch_tokens, tokens, frame_tokens, first_cell, columns, rows, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    pid = tl.program_id(0)
    third = tl.program_id(1)
    first = pid * rows
    last = tl.minimum(first + rows, batch_tokens)
    share_ptr = shares_ptr + (third.to(tl.int64) * tl.num_programs(0) + pid) * WIDTH
    if third == 0:
        _backward_of_one(
            qkv_ptr, gq_ptr, dqkv_ptr, q_weight_ptr, share_ptr, frames_ptr, turns_ptr,
            stride_xb, stride_xt, stride_fb, stride_ff, tokens, frame_tokens, first_cell, columns, first, last, eps,
            HEADS, HEAD_DIM, BLOCK_H, BLOCK_D, NEED_X, NEED_WEIGHT,
        )  # fmt: skip
    elif third == 1:
        _backward_of_one(
            qkv_ptr + WIDTH, gk_ptr, dqkv_ptr + WIDTH, k_weight_ptr, share_ptr, frames_ptr, turns_ptr,
            stride_xb, stride_xt, stride_fb, stride_ff, tokens, frame_tokens, first_cell, columns, first, last, eps,
            HEADS, HEAD_DIM, BLOCK_H, BLOCK_D, NEED_X, NEED_WEIGHT,
        )  # fmt: skip
    else:
        h = tl.arange(0, BLOCK_H)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        zeros = tl.zeros([BLOCK_H, BLOCK_D], dqkv_ptr.dtype.element_ty)
        for i in range(0, last - first):
            at = (first + i).to(tl.int64) * (3 * WIDTH) + 2 * WIDTH + h * HEAD_DIM + d
            tl.store(dqkv_ptr + at, zeros, mask=(h < HEADS) & (d < HEAD_DIM))


@triton.jit
def _qk_norm_rope_bwd_weight_kernel(
    shares_ptr, q_weight_ptr, k_weight_ptr, shares, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Gradients [WIDTH] of both weights: the sums of shares [2, shares, WIDTH]."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)[:, None]
    from_ptr = shares_ptr + which.to(tl.int64) * shares * WIDTH + n * WIDTH + c[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, shares, BLOCK_N):
        mask = (start + n < shares) & (c[None, :] < WIDTH)
        acc += tl.load(from_ptr + start * WIDTH, mask=mask, other=0)
    gradient = tl.sum(acc, 0)
    if which == 0:
        tl.store(q_weight_ptr + c, gradient.to(q_weight_ptr.dtype.element_ty), mask=c < WIDTH)
    else:
        tl.store(k_weight_ptr + c, gradient.to(k_weight_ptr.dtype.element_ty), mask=c < WIDTH)


def rows_of(batch_tokens: int) -> int:
    """Tokens that one program walks through: of the shape alone, so that sums come out the same on every GPU."""
    return max(FEWEST_ROWS, triton.cdiv(batch_tokens, MOST_SHARES))


def launch(grads: list[Tensor], needed: list[bool], *arguments: Any) -> list[Tensor]:
    """hiar::qk_norm_rope_backward."""
    inputs = RopeInputs(*arguments).on_device("qk_norm_rope_backward")
    qkv, q_weight, k_weight, frames = inputs.qkv, inputs.q_weight, inputs.k_weight, inputs.frames
    b, t, c = qkv.shape
    need_x, need_weight = needed[0], needed[1] or needed[2]
    rows = rows_of(b * t)
    shares = triton.cdiv(b * t, rows)
    dqkv = torch.empty((b, t, c) if need_x else (0,), dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty((2, shares if need_weight else 0, c // 3), dtype=torch.float32, device=qkv.device)
    dweights = [torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in (q_weight, k_weight)]
    with torch.cuda.device_of(qkv):
        if shares and any(needed):
            _qk_norm_rope_bwd_kernel[(shares, 3 if need_x else 2)](
                qkv, *(g.contiguous() for g in grads), dqkv, q_weight.contiguous(), k_weight.contiguous(), partial,
                frames, turns_of(inputs.head_dim, inputs.theta, qkv.device), *qkv.stride()[:2], *row_strides(frames),
                b * t, t, inputs.frame_tokens, inputs.first_cell, inputs.width, rows, inputs.eps,
                HEADS=inputs.num_heads, HEAD_DIM=inputs.head_dim, NEED_X=need_x, NEED_WEIGHT=need_weight,
                **tile(inputs.num_heads, inputs.head_dim, 16), **FUSED,
            )  # fmt: skip
        if need_weight:
            grid = (triton.cdiv(c // 3, SUM_TILE["BLOCK_C"]), 2)
            _qk_norm_rope_bwd_weight_kernel[grid](partial, *dweights, shares, WIDTH=c // 3, **SUM_TILE, **FUSED)
    return [g for g, need in zip((dqkv, *dweights), needed, strict=True) if need]


register("qk_norm_rope_backward", launch)


def compile_cases(arch: int) -> list[Case]:
    """In bfloat16; the configuration is the same on every architecture."""
    types = dict.fromkeys(("qkv_ptr", "gq_ptr", "gk_ptr", "dqkv_ptr", "q_weight_ptr", "k_weight_ptr"), "*bf16")
    types |= {"shares_ptr": "*fp32", "turns_ptr": "*i64", "eps": "fp32"}
    cases = []
    for heads in HEADS:
        name, config = f"{heads} heads", tile(heads, HEAD_DIM, 16)
        warps = config.pop("num_warps")
        fixed: dict[str, Any] = {"HEADS": heads, "HEAD_DIM": HEAD_DIM, "NEED_X": True, "NEED_WEIGHT": True, **config}
        sums = {"WIDTH": heads * HEAD_DIM, **SUM_TILE}
        cases.append(Case.of(name, _qk_norm_rope_bwd_kernel, types, fixed, ("stride_x",), num_warps=warps))
        cases.append(Case.of(name, _qk_norm_rope_bwd_weight_kernel, types, sums, ()))
    return cases
