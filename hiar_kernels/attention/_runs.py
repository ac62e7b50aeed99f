# mypy: allow-incomplete-defs
"""The loops over tiles in the attention kernels: whole tiles without a mask, and the rest of a run with one."""

from __future__ import annotations

import triton
import triton.language as tl

from ._visible import EVERY, block_end, frame_at, sees


@triton.jit
def attend_whole(
    acc, total, highest, q, lo, hi, k_ptr, v_ptr, stride_kt, stride_vt, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_KV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys lo..hi, whole tiles that every query sees."""
    offs = tl.arange(0, BLOCK_KV)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    k_offs, v_offs = offs[:, None] * stride_kt + dims, offs[:, None] * stride_vt + dims
    for start in tl.range(lo, hi, BLOCK_KV):
        k = tl.load(k_ptr + tl.cast(start, tl.int64) * stride_kt + k_offs)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        new = tl.maximum(highest, tl.max(scores, 1) * qk_scale)
        p = tl.exp2(scores * qk_scale - new[:, None])
        keep = tl.exp2(highest - new)
        total = total * keep + tl.sum(p, 1)
        v = tl.load(v_ptr + tl.cast(start, tl.int64) * stride_vt + v_offs)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        highest = new
    return acc, total, highest


@triton.jit
def attend_rest(
    acc, total, highest, q, lo, hi, k_ptr, v_ptr, stride_kt, stride_vt, frames_ptr, counts_ptr, first_frame,
    frame_tokens, ends, before, back, sink_end, qk_scale,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_KV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys lo..hi with a mask, in smaller tiles: it takes registers."""
    offs = tl.arange(0, BLOCK_KV)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    k_offs, v_offs = offs[:, None] * stride_kt + dims, offs[:, None] * stride_vt + dims
    for start in tl.range(lo, hi, BLOCK_KV):
        cols = start + offs
        inside = cols < hi
        if counts_ptr is not None:
            count = tl.load(counts_ptr + cols, mask=inside, other=0).to(tl.float32)
            inside = inside & (count > 0)
        k = tl.load(k_ptr + tl.cast(start, tl.int64) * stride_kt + k_offs, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
        if counts_ptr is not None:
            scores += tl.log2(tl.where(inside, count, 1.0))[None, :]
        if MASKED:
            frames = frame_at(frames_ptr, cols // frame_tokens, inside, first_frame)
            scores = tl.where(sees(frames[None, :], ends[:, None], before, back, sink_end), scores, float("-inf"))
        else:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)  # a query that has seen nothing so far
        p = tl.exp2(scores - finite[:, None])
        keep = tl.exp2(highest - finite)
        total = total * keep + tl.sum(p, 1)
        v = tl.load(v_ptr + tl.cast(start, tl.int64) * stride_vt + v_offs, mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        highest = new
    return acc, total, highest


@triton.jit
def dq_whole(
    acc, q, dout, lse2, delta, lo, hi, k_ptr, v_ptr, stride_kt, stride_vt, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_KV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys lo..hi, whole tiles that every query sees."""
    offs = tl.arange(0, BLOCK_KV)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    k_offs, v_offs = offs[:, None] * stride_kt + dims, offs[:, None] * stride_vt + dims
    for start in tl.range(lo, hi, BLOCK_KV):
        k = tl.load(k_ptr + tl.cast(start, tl.int64) * stride_kt + k_offs)
        v = tl.load(v_ptr + tl.cast(start, tl.int64) * stride_vt + v_offs)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(scores * qk_scale - lse2[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dq_rest(
    acc, q, dout, lse2, delta, lo, hi, k_ptr, v_ptr, stride_kt, stride_vt, frames_ptr, counts_ptr, first_frame,
    frame_tokens, ends, before, back, sink_end, qk_scale,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_KV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys lo..hi with a mask, in smaller tiles: it takes registers."""
    offs = tl.arange(0, BLOCK_KV)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    k_offs, v_offs = offs[:, None] * stride_kt + dims, offs[:, None] * stride_vt + dims
    for start in tl.range(lo, hi, BLOCK_KV):
        cols = start + offs
        inside = cols < hi
        if counts_ptr is not None:
            count = tl.load(counts_ptr + cols, mask=inside, other=0).to(tl.float32)
            inside = inside & (count > 0)
        k = tl.load(k_ptr + tl.cast(start, tl.int64) * stride_kt + k_offs, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + tl.cast(start, tl.int64) * stride_vt + v_offs, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
        if counts_ptr is not None:
            scores += tl.log2(tl.where(inside, count, 1.0))[None, :]
        if MASKED:
            frames = frame_at(frames_ptr, cols // frame_tokens, inside, first_frame)
            seen = sees(frames[None, :], ends[:, None], before, back, sink_end)
        else:
            seen = inside[None, :]
        p = tl.where(seen, tl.exp2(scores - lse2[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dkdv_whole(
    dk, dv, k, v, bias, lo, hi, q_ptr, dout_ptr, lse2_ptr, delta_ptr, stride_qt, stride_dt, qk_scale,
    COUNTS: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries lo..hi, whole tiles that see every key."""
    offs = tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    q_offs, d_offs = offs[:, None] * stride_qt + dims, offs[:, None] * stride_dt + dims
    for start in tl.range(lo, hi, BLOCK_Q):
        q = tl.load(q_ptr + tl.cast(start, tl.int64) * stride_qt + q_offs)
        dout = tl.load(dout_ptr + tl.cast(start, tl.int64) * stride_dt + d_offs)
        lse2 = tl.load(lse2_ptr + start + offs)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale
        if COUNTS:
            scores += bias[:, None]
        p = tl.exp2(scores - lse2[None, :])
        if NEED_DV:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if NEED_DK:
            delta = tl.load(delta_ptr + start + offs)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkdv_rest(
    dk, dv, k, v, bias, lo, hi, q_ptr, dout_ptr, lse2_ptr, delta_ptr, stride_qt, stride_dt, q_frames_ptr, first_frame,
    frame_tokens, origin, frames_per_block, frames, before, back, sink_end, qk_scale,
    KEYS: tl.constexpr, COUNTS: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries lo..hi with a mask, in smaller tiles: it takes registers."""
    offs = tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    q_offs, d_offs = offs[:, None] * stride_qt + dims, offs[:, None] * stride_dt + dims
    for start in tl.range(lo, hi, BLOCK_Q):
        rows = start + offs
        live = rows < hi
        q = tl.load(q_ptr + tl.cast(start, tl.int64) * stride_qt + q_offs, mask=live[:, None], other=0.0)
        dout = tl.load(dout_ptr + tl.cast(start, tl.int64) * stride_dt + d_offs, mask=live[:, None], other=0.0)
        lse2 = tl.load(lse2_ptr + rows, mask=live, other=float("inf"))
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale
        if COUNTS:
            scores += bias[:, None]
        if KEYS == EVERY:
            seen = live[None, :]
        else:
            q_frames = frame_at(q_frames_ptr, rows // frame_tokens, live, first_frame)
            ends = block_end(q_frames, origin, frames_per_block)
            seen = sees(frames[:, None], ends[None, :], before, back, sink_end) & live[None, :]
        p = tl.where(seen, tl.exp2(scores - lse2[None, :]), 0.0)
        if NEED_DV:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if NEED_DK:
            delta = tl.load(delta_ptr + rows, mask=live, other=0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            ds = tl.where(seen, p * (dp - delta[None, :]), 0.0)  # an unseen key may be NaN
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv
