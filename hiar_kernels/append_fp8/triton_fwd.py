# mypy: allow-incomplete-defs
"""append_fp8 and qk_norm_rope_append_fp8 in Triton, two launches each.

The scale of a frame and head needs all its tokens. The first launch finds the largest numbers of parts of it (of a
token, or of a tile) and writes them, beside q and, unrounded to 8 bits, k. The second takes the largest of them, in any
order the same, and writes keys, values and scales. README.md beside this file has the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.float8 import GROUP, bits, padded
from ..common.shapes import HEAD_DIM, HEADS
from ..common.triton_float8 import HARDWARE_FROM, largest_in, quantize_by, quantize_tile, scale_of, stored_scale
from ..common.triton_loader import FUSED, architecture, register
from ..qk_norm_rope.inputs import empty_like_q, turns_of
from ..qk_norm_rope.triton_fwd import cos_sin, inverse_rms, row_strides, tile, turn
from .inputs import Fp8Rings, empty_parts, rope_from_schema
from .ops import empty_q


@triton.jit
def _rope_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, frames_ptr, turns_ptr, q_ptr, q_scales_ptr, k_ptr, parts_ptr,
    stride_xb, stride_xt, stride_fb, stride_ff, frame_tokens, frames, columns, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    QUANTIZE_Q: tl.constexpr, HARDWARE: tl.constexpr
):  # fmt: skip
    """One token: q, k rounded as qk_norm_rope rounds it, the largest |k| and |v| of each head."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    token = tl.program_id(0)
    frame, cell = token // frame_tokens, token % frame_tokens
    batch = tl.program_id(1).to(tl.int64)

    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    inside = (h < HEADS)[:, None] & (d < HEAD_DIM)[None, :]
    at = h[:, None] * HEAD_DIM + d[None, :]
    x_ptr = qkv_ptr + batch * stride_xb + token.to(tl.int64) * stride_xt
    row = batch * tl.num_programs(0) + token
    # largest of k, then of v: [2, B, F, H, frame_tokens]
    part_ptr = parts_ptr + ((batch * frames + frame) * HEADS + h) * frame_tokens + cell
    all_parts = (tl.num_programs(0) * HEADS * tl.num_programs(1)).to(tl.int64)

    v = tl.load(x_ptr + 2 * WIDTH + at, mask=inside, other=0).to(tl.float32)
    tl.store(part_ptr + all_parts, largest_in(v), mask=h < HEADS)
    frame_id = tl.load(frames_ptr + batch * stride_fb + frame.to(tl.int64) * stride_ff).to(tl.int64)
    cos, sin = cos_sin(turns_ptr, frame_id, cell // columns, cell % columns, HEAD_DIM, BLOCK_D)

    k = tl.load(x_ptr + WIDTH + at, mask=inside, other=0).to(tl.float32)
    weight = tl.load(k_weight_ptr + at, mask=inside, other=0).to(tl.float32)
    k = turn(k * inverse_rms(k, eps, WIDTH) * weight, cos, sin, BLOCK_H, BLOCK_D).to(k_ptr.dtype.element_ty)
    tl.store(k_ptr + row * WIDTH + at, k, mask=inside)
    tl.store(part_ptr, largest_in(k.to(tl.float32)), mask=h < HEADS)

    q = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    weight = tl.load(q_weight_ptr + at, mask=inside, other=0).to(tl.float32)
    q = turn(q * inverse_rms(q, eps, WIDTH) * weight, cos, sin, BLOCK_H, BLOCK_D).to(k_ptr.dtype.element_ty)
    if QUANTIZE_Q:
        values, scales = quantize_tile(q.to(tl.float32), HARDWARE)
        tl.store(q_ptr + row * WIDTH + at, values, mask=inside)
        tl.store(q_scales_ptr + row * HEADS + h, scales, mask=h < HEADS)
    else:
        tl.store(q_ptr + row * WIDTH + at, q, mask=inside)


@triton.jit
def _largest_kernel(
    k_ptr, v_ptr, parts_ptr, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, frame_tokens, frames,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """A tile of a frame and head: its largest |k| and |v|."""
    block, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, frame = (item // frames).to(tl.int64), item % frames
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    inside = (t < frame_tokens)[:, None] & (d < HEAD_DIM)[None, :]
    token = (frame * frame_tokens + t).to(tl.int64)[:, None]
    k = tl.load(k_ptr + batch * stride_kb + token * stride_kt + head * stride_kh + d[None, :], mask=inside, other=0)
    v = tl.load(v_ptr + batch * stride_vb + token * stride_vt + head * stride_vh + d[None, :], mask=inside, other=0)
    all_parts = (tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)).to(tl.int64)
    part_ptr = parts_ptr + (item.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(0) + block
    tl.store(part_ptr, tl.max(largest_in(k.to(tl.float32)), 0))
    tl.store(part_ptr + all_parts, tl.max(largest_in(v.to(tl.float32)), 0))


@triton.jit
def _scale_of_parts(parts_ptr, parts, BLOCK_N: tl.constexpr):
    """The scale of a frame and head, from the largest numbers of its parts; inf where one is not finite."""
    n = tl.arange(0, BLOCK_N)
    largest = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, parts, BLOCK_N):
        largest = tl.maximum(largest, tl.load(parts_ptr + start + n, mask=start + n < parts, other=0))
    return scale_of(tl.max(largest, 0))


@triton.jit
def _write_kernel(
    k_ptr, v_ptr, parts_ptr, slots_ptr, rows_ptr, k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, slots_n, slots_b, slots_f, rows_n, rows_b,
    stride_cr, stride_ct, stride_ch, stride_wr, stride_ws, stride_wh, stride_wd,
    k_scales_r, k_scales_s, k_scales_h, v_scales_r, v_scales_s, v_scales_h,
    frame_tokens, frames, places, parts, num_slots, num_rows,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, COPIES: tl.constexpr,
    HARDWARE: tl.constexpr
):  # fmt: skip
    """A tile of a frame and head: keys as they come, values transposed, into COPIES rings."""
    block, head, item = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    batch, frame = (item // frames).to(tl.int64), item % frames
    all_parts = (tl.num_programs(1) * tl.num_programs(2)).to(tl.int64) * parts
    part_ptr = parts_ptr + (item.to(tl.int64) * tl.num_programs(1) + head) * parts
    k_scale = _scale_of_parts(part_ptr, parts, BLOCK_N)
    v_scale = _scale_of_parts(part_ptr + all_parts, parts, BLOCK_N)

    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    first = (frame * frame_tokens).to(tl.int64)
    channel = d[None, :] < HEAD_DIM
    k_inside = (t < frame_tokens)[:, None] & channel
    k_at = k_ptr + batch * stride_kb + (first + t)[:, None] * stride_kt + head * stride_kh + d[None, :]
    k = quantize_by(tl.load(k_at, mask=k_inside, other=0).to(tl.float32), k_scale, HARDWARE)

    # place 4 i + {0, 1} of a group holds key 2 i + {0, 1}, place 4 i + {2, 3} key 8 + 2 i + {0, 1}
    key = (t & ~15) + ((t & 2) << 2) + ((t & 12) >> 1) + (t & 1)
    v_inside = (key < frame_tokens)[:, None] & channel
    v_at = v_ptr + batch * stride_vb + (first + key)[:, None] * stride_vt + head * stride_vh + d[None, :]
    v = quantize_by(tl.load(v_at, mask=v_inside, other=0).to(tl.float32), v_scale, HARDWARE)
    v = tl.trans(tl.where(v_inside, v, 0.0 if HARDWARE else 0).to(v.dtype))  # 0 past the last key, if all else is NaN

    for n in tl.static_range(COPIES):
        slot = tl.load(slots_ptr + n * slots_n + batch * slots_b + frame * slots_f).to(tl.int64)
        row = batch
        if rows_ptr is not None:
            row = tl.load(rows_ptr + n * rows_n + batch * rows_b).to(tl.int64)
        # a slot or row out of range must not reach other memory
        there = (slot >= 0) & (slot < num_slots) & (row >= 0) & (row < num_rows)
        k_to = k_cache_ptr + row * stride_cr + (slot * frame_tokens + t)[:, None] * stride_ct + head * stride_ch
        tl.store(k_to + d[None, :], k, mask=k_inside & there)
        v_to = v_cache_ptr + row * stride_wr + slot * stride_ws + head * stride_wh + d[:, None] * stride_wd
        tl.store(v_to + t[None, :], v, mask=(d < HEAD_DIM)[:, None] & (t < places)[None, :] & there)
        if block == 0:
            k_scale_to = k_scales_ptr + row * k_scales_r + slot * k_scales_s + head * k_scales_h
            tl.store(k_scale_to, stored_scale(k_scale), mask=there)
            v_scale_to = v_scales_ptr + row * v_scales_r + slot * v_scales_s + head * v_scales_h
            tl.store(v_scale_to, stored_scale(v_scale), mask=there)


def write_tile(tokens: int, head_dim: int, parts: int, hardware: bool) -> dict[str, int]:
    """Tokens of a tile, blocks of the others, and warps: 32 numbers of k, and of v, in a thread of a full tile; half as
    many where the conversion to 8 bits takes registers too, which spill with Triton 3.6.0.
    """
    block_t = max(GROUP, min(64 if hardware else 32, triton.next_power_of_2(tokens)))
    return {
        "BLOCK_T": block_t, "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_N": min(1024, triton.next_power_of_2(parts)), "num_warps": 8,
    }  # fmt: skip


def _write(k: Tensor, v: Tensor, parts: Tensor, rings: Fp8Rings, hardware: bool) -> None:
    """The second launch: k and v [B, T, H, D], parts [2, B, F, H, N] -> the rings."""
    (batch, tokens, heads, head_dim), frames = k.shape, parts.shape[2]
    tokens //= frames
    config, slots, rows = write_tile(tokens, head_dim, parts.shape[4], hardware), rings.slots, rings.rows
    k_cache, v_cache = (x if hardware else bits(x) for x in (rings.k_cache, rings.v_cache))
    _write_kernel[(triton.cdiv(padded(tokens), config["BLOCK_T"]), heads, batch * frames)](
        k, v, parts, slots, rows, k_cache, v_cache, rings.k_scales, rings.v_scales, *k.stride()[:3], *v.stride()[:3],
        slots.stride(0) if slots.dim() == 3 else 0, *row_strides(slots if slots.dim() == 2 else slots[0]),
        *((0, 0) if rows is None else rows.stride()), *k_cache.stride()[:3], *v_cache.stride()[:4],
        *rings.k_scales.stride(), *rings.v_scales.stride(), tokens, frames, padded(tokens), parts.shape[4],
        rings.num_slots, len(k_cache), HEAD_DIM=head_dim, COPIES=rings.copies, HARDWARE=hardware, **config, **FUSED,
    )  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    """Keys or values [B, T, H, D] with channels side by side, and heads where _largest_kernel finds them by 32 bits."""
    return x if x.stride(3) == 1 and (x.shape[2] - 1) * x.stride(2) < 2**31 else x.contiguous()


def launch(k: Tensor, v: Tensor, *arguments: Any) -> None:
    """hiar::append_fp8."""
    rings = Fp8Rings.of_schema(*arguments)
    rings.validate_layout("append_fp8", k)
    if k.numel() == 0:
        return
    k, v = _dense(k), _dense(v)
    (batch, tokens, heads, head_dim), frames = k.shape, rings.slots.shape[-1]
    tokens //= frames
    hardware = architecture(k) >= HARDWARE_FROM
    config = write_tile(tokens, head_dim, 1, hardware)
    del config["BLOCK_N"]
    blocks = triton.cdiv(tokens, config["BLOCK_T"])
    parts = empty_parts(k, frames, blocks)
    with torch.cuda.device_of(k):
        _largest_kernel[(blocks, heads, batch * frames)](
            k, v, parts, *k.stride()[:3], *v.stride()[:3], tokens, frames, HEAD_DIM=head_dim, **config, **FUSED,
        )  # fmt: skip
        _write(k, v, parts, rings, hardware)


def rope_tile(heads: int, head_dim: int) -> dict[str, int]:
    """Blocks that hold one token's q, k or v whole, 32 numbers of it in a thread."""
    return tile(heads, head_dim, 32)


def launch_rope(*arguments: Any) -> tuple[Tensor, Tensor]:
    """hiar::qk_norm_rope_append_fp8."""
    op = "qk_norm_rope_append_fp8"
    inputs, rings, quantize_q = rope_from_schema(*arguments)
    inputs = inputs.on_device(op)
    qkv, heads, head_dim, tokens = inputs.qkv, inputs.num_heads, inputs.head_dim, inputs.frame_tokens
    rings.validate_layout(op, qkv)
    q, q_scales = empty_q(inputs, quantize_q)
    if q.numel() == 0:
        return q, q_scales
    k, v, frames = empty_like_q(inputs), qkv[..., 2 * heads * head_dim :].unflatten(-1, (heads, -1)), inputs.frames
    parts, hardware = empty_parts(k, frames.shape[1], tokens), architecture(qkv) >= HARDWARE_FROM
    with torch.cuda.device_of(qkv):
        _rope_kernel[(q.shape[1], q.shape[0])](
            qkv, inputs.q_weight.contiguous(), inputs.k_weight.contiguous(), frames,
            turns_of(head_dim, inputs.theta, qkv.device), q if hardware else bits(q), q_scales, k, parts,
            *qkv.stride()[:2], *row_strides(frames), tokens, frames.shape[1], inputs.width, inputs.eps, HEADS=heads,
            HEAD_DIM=head_dim, QUANTIZE_Q=quantize_q, HARDWARE=hardware, **rope_tile(heads, head_dim), **FUSED,
        )  # fmt: skip
        _write(k, v, parts, rings, hardware)
    return q, q_scales


register("append_fp8", launch)
register("qk_norm_rope_append_fp8", launch_rope)


def compile_cases(arch: int) -> list[Case]:
    """In bfloat16, frames of 1560 tokens."""
    hardware = arch >= HARDWARE_FROM
    e4m3 = "*fp8e4nv" if hardware else "*u8"
    types = dict.fromkeys(("qkv_ptr", "q_weight_ptr", "k_weight_ptr", "k_ptr", "v_ptr"), "*bf16")
    types |= dict.fromkeys(("parts_ptr", "q_scales_ptr", "k_scales_ptr", "v_scales_ptr"), "*fp32")
    types |= {"turns_ptr": "*i64", "eps": "fp32", "k_cache_ptr": e4m3, "v_cache_ptr": e4m3}
    aligned, cases = ("stride_x", "stride_k", "stride_v", "stride_c", "stride_w", "places"), []
    for heads in HEADS:
        config = rope_tile(heads, HEAD_DIM)
        warps = config.pop("num_warps")
        for name, quantize_q in (("q in bfloat16", False), ("q in 8 bits", True)):
            fixed: dict[str, Any] = {"HEADS": heads, "HEAD_DIM": HEAD_DIM, "QUANTIZE_Q": quantize_q, **config}
            fixed["HARDWARE"] = hardware
            kinds = types | {"q_ptr": e4m3 if quantize_q else "*bf16"}
            cases.append(Case.of(f"{name}, {heads} heads", _rope_kernel, kinds, fixed, aligned, num_warps=warps))
    config = write_tile(1560, HEAD_DIM, 1560, hardware)
    warps = config.pop("num_warps")
    for name, copies in (("one ring", 1), ("two rings", 2)):
        fixed = {"HEAD_DIM": HEAD_DIM, "COPIES": copies, "HARDWARE": hardware, **config}
        fixed |= {"rows_ptr": None} if copies < 2 else {}
        cases.append(Case.of(name, _write_kernel, types, fixed, aligned, num_warps=warps))
    fixed = {"HEAD_DIM": HEAD_DIM, **config}
    del fixed["BLOCK_N"]
    return [*cases, Case.of("separate keys", _largest_kernel, types, fixed, aligned, num_warps=warps)]
