# mypy: allow-incomplete-defs
"""Inner loops of the attention kernels: full tiles without a mask, and the rest of a run with one."""

from __future__ import annotations

import triton
import triton.language as tl

from ._visible import EVERY, block_end, frame_at, sees


@triton.jit
def attend_whole(
    acc, l_i, m_i, q, lo, hi, k_ptr, v_ptr, stride_kt, stride_vt, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_KV: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Keys lo..hi in full tiles that are visible to every query."""
    offs = tl.arange(0, BLOCK_KV)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    k_offs, v_offs = offs[:, None] * stride_kt + dims, offs[:, None] * stride_vt + dims
    for start in tl.range(lo, hi, BLOCK_KV):
        k = tl.load(k_ptr + tl.cast(start, tl.int64) * stride_kt + k_offs)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        m_new = tl.maximum(m_i, tl.max(scores, 1) * qk_scale)
        p = tl.exp2(scores * qk_scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + tl.cast(start, tl.int64) * stride_vt + v_offs)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def attend_rest(
    acc, l_i, m_i, q, lo, hi, k_ptr, v_ptr, stride_kt, stride_vt, frames_ptr, counts_ptr, first_frame,
    frame_tokens, ends, before, back, sink_end, qk_scale,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_KV: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Keys lo..hi with a mask, in smaller tiles because the mask needs registers."""
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
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # no visible key so far
        p = tl.exp2(scores - finite[:, None])
        alpha = tl.exp2(m_i - finite)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + tl.cast(start, tl.int64) * stride_vt + v_offs, mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def dq_whole(
    acc, q, dout, lse2, delta, lo, hi, k_ptr, v_ptr, stride_kt, stride_vt, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_KV: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Keys lo..hi in full tiles that are visible to every query."""
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
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_KV: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Keys lo..hi with a mask, in smaller tiles because the mask needs registers."""
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
            visible = sees(frames[None, :], ends[:, None], before, back, sink_end)
        else:
            visible = inside[None, :]
        p = tl.where(visible, tl.exp2(scores - lse2[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dkdv_whole(
    dk, dv, k, v, bias, lo, hi, q_ptr, dout_ptr, lse2_ptr, delta_ptr, stride_qt, stride_dt, qk_scale,
    COUNTS: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """Queries lo..hi in full tiles that see every key."""
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
    BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Queries lo..hi with a mask, in smaller tiles because the mask needs registers."""
    offs = tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    q_offs, d_offs = offs[:, None] * stride_qt + dims, offs[:, None] * stride_dt + dims
    for start in tl.range(lo, hi, BLOCK_Q):
        rows = start + offs
        q_mask = rows < hi
        q = tl.load(q_ptr + tl.cast(start, tl.int64) * stride_qt + q_offs, mask=q_mask[:, None], other=0.0)
        dout = tl.load(dout_ptr + tl.cast(start, tl.int64) * stride_dt + d_offs, mask=q_mask[:, None], other=0.0)
        lse2 = tl.load(lse2_ptr + rows, mask=q_mask, other=float("inf"))
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale
        if COUNTS:
            scores += bias[:, None]
        if KEYS == EVERY:
            visible = q_mask[None, :]
        else:
            q_frames = frame_at(q_frames_ptr, rows // frame_tokens, q_mask, first_frame)
            ends = block_end(q_frames, origin, frames_per_block)
            visible = sees(frames[:, None], ends[None, :], before, back, sink_end) & q_mask[None, :]
        p = tl.where(visible, tl.exp2(scores - lse2[None, :]), 0.0)
        if NEED_DV:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if NEED_DK:
            delta = tl.load(delta_ptr + rows, mask=q_mask, other=0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            ds = tl.where(visible, p * (dp - delta[None, :]), 0.0)  # a hidden key may be NaN
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv
