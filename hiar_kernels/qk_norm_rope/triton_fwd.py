# mypy: allow-incomplete-defs
"""qk_norm_rope and qk_norm_rope_append in Triton: one program norms and turns q and k of one token.

Angles need more than float32: at frame 1,000,000 a float32 product of id and frequency has lost every digit after the
point. They are counted in turns, in 64-bit fixed point: id * frequency / 2 pi modulo 1 is one wrapping integer
multiplication, exact to id * 2^-65 turns for any id. README.md beside this file has the rest.
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
from .inputs import RopeInputs, append_from_schema, empty_like_q, turns_of


@triton.jit
def cos_sin(turns_ptr, frame, row, column, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """cos and sin [1, BLOCK_D / 2] of the angles of one token's pairs, for its place (frame in int64)."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    THIRD: tl.constexpr = PAIRS // 3
    pair = tl.arange(0, BLOCK_D // 2)[None, :]
    turns = tl.load(turns_ptr + pair, mask=pair < PAIRS, other=0)
    place = tl.where(pair < PAIRS - 2 * THIRD, frame, tl.where(pair < PAIRS - THIRD, row, column))
    angle = place * turns  # wraps around: one turn is 2^64, so whole turns drop out
    quarter = ((angle >> 61) + 1) >> 1  # to the nearest quarter turn; what is left is t pi / 4, -1 <= t < 1
    t = ((angle << 2) >> 32).to(tl.int32).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    z = t * t
    # Taylor terms of sin(t pi / 4) and cos(t pi / 4): the first ones left out are below 2^-25
    sine = -3.6576204e-05 + z * 3.1336162e-07
    sine = t * (0.78539816 + z * (-0.080745512 + z * (0.0024903946 + z * sine)))
    cosine = 3.5908605e-06 + z * -2.4611370e-08
    cosine = 1.0 + z * (-0.30842514 + z * (0.015854344 + z * (-0.00032599189 + z * cosine)))
    odd = (quarter & 1) != 0
    c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -c, c), tl.where((quarter & 2) != 0, -s, s)


@triton.jit
def turn(x, cos, sin, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Adjacent pairs of x [BLOCK_H, BLOCK_D] as complex numbers, turned."""
    even, odd = tl.split(tl.reshape(x, [BLOCK_H, BLOCK_D // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK_H, BLOCK_D])


@triton.jit
def inverse_rms(x, eps, WIDTH: tl.constexpr):
    """1 / root mean square over the whole tile; what is masked must be zero."""
    return 1.0 / tl.sqrt_rn(tl.sum(tl.sum(x * x, 1), 0) / WIDTH + eps)


@triton.jit
def _qk_norm_rope_fwd_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, frames_ptr, turns_ptr, slots_ptr, rows_ptr, q_ptr, k_ptr, v_ptr,
    stride_xb, stride_xt, stride_fb, stride_ff, stride_sn, stride_sb, stride_sf, stride_rn, stride_rb,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    frame_tokens, first_cell, columns, num_slots, num_rows, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, COPIES: tl.constexpr
):  # fmt: skip
    """COPIES: how often k and v are written into the ring; 0: k only, to where k_ptr is a tensor like q."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    token = tl.program_id(0)  # divisions in 32 bits, offsets in 64
    frame = (token // frame_tokens).to(tl.int64)
    cell = token % frame_tokens
    batch = tl.program_id(1).to(tl.int64)

    h = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (h < HEADS) & (d < HEAD_DIM)
    at = h * HEAD_DIM + d
    x_ptr = qkv_ptr + batch * stride_xb + token.to(tl.int64) * stride_xt
    out = (batch * tl.num_programs(0) + token) * WIDTH
    q = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    k = tl.load(x_ptr + WIDTH + at, mask=inside, other=0).to(tl.float32)
    q_weight = tl.load(q_weight_ptr + at, mask=inside, other=0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + at, mask=inside, other=0).to(tl.float32)
    frame_id = tl.load(frames_ptr + batch * stride_fb + frame * stride_ff).to(tl.int64)
    place = first_cell + cell  # in the whole frame
    cos, sin = cos_sin(turns_ptr, frame_id, place // columns, place % columns, HEAD_DIM, BLOCK_D)

    q = turn(q * inverse_rms(q, eps, WIDTH) * q_weight, cos, sin, BLOCK_H, BLOCK_D)
    tl.store(q_ptr + out + at, q.to(q_ptr.dtype.element_ty), mask=inside)
    k = turn(k * inverse_rms(k, eps, WIDTH) * k_weight, cos, sin, BLOCK_H, BLOCK_D)
    if COPIES == 0:
        tl.store(k_ptr + out + at, k.to(k_ptr.dtype.element_ty), mask=inside)
    else:
        v = tl.load(x_ptr + 2 * WIDTH + at, mask=inside, other=0)
        heads = h.to(tl.int64)
        for n in tl.static_range(COPIES):
            slot = tl.load(slots_ptr + n * stride_sn + batch * stride_sb + frame * stride_sf).to(tl.int64)
            row = batch
            if rows_ptr is not None:
                row = tl.load(rows_ptr + n * stride_rn + batch * stride_rb).to(tl.int64)
            # a slot or row out of range must not reach other memory
            there = inside & (slot >= 0) & (slot < num_slots) & (row >= 0) & (row < num_rows)
            to = slot * frame_tokens + cell
            v_at = v_ptr + row * stride_vb + to * stride_vt + heads * stride_vh + d
            tl.store(v_at, v.to(v_ptr.dtype.element_ty), mask=there)
            k_at = k_ptr + row * stride_kb + to * stride_kt + heads * stride_kh + d
            tl.store(k_at, k.to(k_ptr.dtype.element_ty), mask=there)


def tile(num_heads: int, head_dim: int, numbers: int = 64) -> dict[str, int]:
    """Blocks that hold one token's q (or k) whole, and the warps that give each thread so many ``numbers`` of it.

    Of 1, 2, 4 and 8 warps for 12 heads one was the fastest on an H200: 26.2, 28.7, 28.4, 32.8 us.
    """
    block_h, block_d = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim)
    return {"BLOCK_H": block_h, "BLOCK_D": block_d, "num_warps": min(max(block_h * block_d // (32 * numbers), 1), 16)}


def row_strides(ids: Tensor) -> tuple[int, int]:
    """Strides of ids [B or 1, F]: one row serves the whole batch."""
    return (ids.stride(0) if ids.shape[0] > 1 else 0), ids.stride(1)


def _launch(inputs: RopeInputs, slots: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, copies: int) -> Tensor:
    """Write k (with copies also v) and return q; without copies slots and v are placeholders."""
    qkv, frame_tokens = inputs.qkv, inputs.frame_tokens
    q = empty_like_q(inputs)
    if q.numel() == 0:
        return q
    with torch.cuda.device_of(qkv):
        _qk_norm_rope_fwd_kernel[(q.shape[1], q.shape[0])](
            qkv, inputs.q_weight.contiguous(), inputs.k_weight.contiguous(), inputs.frames,
            turns_of(inputs.head_dim, inputs.theta, qkv.device), slots, rows, q, k, v, *qkv.stride()[:2],
            *row_strides(inputs.frames), slots.stride(0) if slots.dim() == 3 else 0,
            *row_strides(slots if slots.dim() == 2 else slots[0]), *((0, 0) if rows is None else rows.stride()),
            *k.stride()[:3], *v.stride()[:3], frame_tokens, inputs.first_cell, inputs.width,
            k.shape[1] // frame_tokens, k.shape[0], inputs.eps, HEADS=inputs.num_heads, HEAD_DIM=inputs.head_dim,
            COPIES=copies, **tile(inputs.num_heads, inputs.head_dim), **FUSED,
        )  # fmt: skip
    return q


def launch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """hiar::qk_norm_rope."""
    inputs = RopeInputs(*arguments).on_device("qk_norm_rope")
    k = empty_like_q(inputs)
    return _launch(inputs, inputs.frames, k, k, None, 0), k


def launch_append(*arguments: Any) -> Tensor:
    """hiar::qk_norm_rope_append."""
    op = "qk_norm_rope_append"
    inputs, rings = append_from_schema(*arguments)
    inputs = inputs.on_device(op, slots=rings.slots, rows=rings.rows)
    rings.validate_layout(op)
    return _launch(inputs, rings.slots, rings.k_cache, rings.v_cache, rings.rows, rings.copies)


register("qk_norm_rope", launch)
register("qk_norm_rope_append", launch_append)


def compile_cases(arch: int) -> list[Case]:
    """In bfloat16; the configuration is the same on every architecture."""
    kernel = _qk_norm_rope_fwd_kernel
    types = dict.fromkeys(("qkv_ptr", "q_weight_ptr", "k_weight_ptr", "q_ptr", "k_ptr", "v_ptr"), "*bf16")
    types |= dict.fromkeys(("frames_ptr", "slots_ptr", "rows_ptr"), "*i32") | {"turns_ptr": "*i64", "eps": "fp32"}
    cases = []
    for heads in HEADS:
        config = tile(heads, HEAD_DIM)
        warps = config.pop("num_warps")
        for name, copies in (("functional", 0), ("append", 1), ("append to two rings", 2)):
            fixed: dict[str, Any] = {"HEADS": heads, "HEAD_DIM": HEAD_DIM, "COPIES": copies, **config}
            fixed |= {"rows_ptr": None} if copies < 2 else {}
            aligned = ("stride_x", "stride_k", "stride_v")
            cases.append(Case.of(f"{name}, {heads} heads", kernel, types, fixed, aligned, num_warps=warps))
    return cases
