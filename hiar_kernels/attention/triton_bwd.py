# mypy: allow-incomplete-defs
"""attention in Triton: backward. Deterministic: every gradient is summed by one program, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compile import Case
from .._triton import register
from ._launch import (
    DKDV,
    DKDV_UNMASKED,
    DQ,
    RULE,
    Tile,
    check,
    dense_rows,
    ids_of,
    pick,
    production_case,
    row_stride,
    rule_arguments,
    strides,
    tile_for,
    windows_on,
)
from ._visible import (
    EARLIER,
    EVERY,
    NONE,
    OWN,
    SEEN,
    block_end,
    frame_at,
    key_bounds,
    key_run,
    key_source,
    limits,
    query_ends,
    query_run,
    sees,
    unmasked_until,
)

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["q_tokens", "tiles"])
def _attention_bwd_delta_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, lse2_ptr, q_tokens, tiles, H,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, and the logsumexp to base 2; +inf where nothing is seen, so that p is 0."""
    pid = tl.program_id(0)
    bh = (pid // tiles).to(tl.int64)
    t = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = t < q_tokens
    offs = ((bh // H * q_tokens + t[:, None]) * H + bh % H) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    dout = tl.load(dout_ptr + offs, mask=live[:, None], other=0.0).to(tl.float32)
    out = tl.load(out_ptr + offs, mask=live[:, None], other=0.0).to(tl.float32)
    rows = bh * q_tokens + t
    lse = tl.load(lse_ptr + rows, mask=live, other=float("-inf"))
    dlse = tl.load(dlse_ptr + rows, mask=live, other=0.0)
    nothing = lse == float("-inf")
    tl.store(delta_ptr + rows, tl.where(nothing, 0.0, tl.sum(dout * out, 1) - dlse), mask=live)
    tl.store(lse2_ptr + rows, tl.where(nothing, float("inf"), lse * _LOG2E), mask=live)


@triton.jit
def _dq_run(
    acc, q, dout, lse2, delta, lo, mid, hi, k_ptr, v_ptr, stride_kt, stride_vt, frames_ptr, counts_ptr, first_frame,
    frame_tokens, ends, before, back, sink_end, qk_scale,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys lo..mid in whole tiles without a mask, mid..hi in smaller ones with a mask: it takes registers."""
    offs = tl.arange(0, BLOCK_KV)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    k_offs, v_offs = offs[:, None] * stride_kt + dims, offs[:, None] * stride_vt + dims
    for start in tl.range(lo, mid, BLOCK_KV):
        k = tl.load(k_ptr + tl.cast(start, tl.int64) * stride_kt + k_offs)
        v = tl.load(v_ptr + tl.cast(start, tl.int64) * stride_vt + v_offs)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(scores * qk_scale - lse2[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    offs = tl.arange(0, BLOCK_MASKED)
    k_offs, v_offs = offs[:, None] * stride_kt + dims, offs[:, None] * stride_vt + dims
    for start in tl.range(mid, hi, BLOCK_MASKED):
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


@triton.jit(do_not_specialize=["q_tokens", "kv_tokens", "context_tokens", "q_tiles", *RULE])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, context_k_ptr, context_v_ptr, q_frames_ptr, kv_frames_ptr, context_frames_ptr, windows_ptr,
    counts_ptr, dout_ptr, lse2_ptr, delta_ptr, dq_ptr, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_ckb, stride_ckt, stride_ckh, stride_cvb, stride_cvt, stride_cvh,
    stride_qfb, stride_kfb, stride_cfb, stride_nb, q_tokens, kv_tokens, context_tokens, q_tiles, H, qk_scale, dq_scale,
    frame_tokens, frames_per_block, first_frame, origin, sink_frames, sink_end,
    MASKED: tl.constexpr, CONTEXT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head and row."""
    pid = tl.program_id(0)
    tile = q_tiles - 1 - pid % q_tiles
    h = (pid // q_tiles % H).to(tl.int64)
    b = (pid // q_tiles // H).to(tl.int64)

    t = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = t < q_tokens
    dims = tl.arange(0, HEAD_DIM)
    wide = t.to(tl.int64)[:, None]
    q_offs = b * stride_qb + h * stride_qh + wide * stride_qt + dims[None, :]
    q = tl.load(q_ptr + q_offs, mask=live[:, None], other=0.0)
    dense = ((b * q_tokens + wide) * H + h) * HEAD_DIM + dims[None, :]
    dout = tl.load(dout_ptr + dense, mask=live[:, None], other=0.0)
    rows = (b * H + h) * q_tokens + t
    lse2 = tl.load(lse2_ptr + rows, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=live, other=0.0)

    acc = tl.zeros([BLOCK_Q, HEAD_DIM], dtype=tl.float32)
    if MASKED:
        if q_frames_ptr is not None:
            q_frames_ptr += b * stride_qfb
        ends, least, greatest = query_ends(q_frames_ptr, t, live, first_frame, frame_tokens, origin, frames_per_block)
        for n in range(1 - CONTEXT, 2):
            run_k_ptr, run_v_ptr, run_kt, run_vt, frames_ptr, tokens, before, back, sinks = key_source(
                tl.cast(n, tl.int32) == 1, b, h, k_ptr, v_ptr, kv_frames_ptr, stride_kb, stride_kt, stride_kh,
                stride_vb, stride_vt, stride_vh, stride_kfb, kv_tokens, context_k_ptr, context_v_ptr,
                context_frames_ptr, stride_ckb, stride_ckt, stride_ckh, stride_cvb, stride_cvt, stride_cvh,
                stride_cfb, context_tokens, windows_ptr, frames_per_block, sink_frames, sink_end, CONTEXT,
            )  # fmt: skip
            slots = tokens // frame_tokens
            slot = 0
            while slot < slots:
                kind, stop = key_run(
                    slot, slots, frames_ptr, first_frame, ends, live, least, greatest, before, back, sinks
                )
                lo = slot * frame_tokens
                hi = tl.where(kind == NONE, lo, stop * frame_tokens)
                mid = unmasked_until(lo, hi, kind, BLOCK_KV)
                acc = _dq_run(
                    acc, q, dout, lse2, delta, lo, mid, hi, run_k_ptr, run_v_ptr, run_kt, run_vt, frames_ptr, None,
                    first_frame, frame_tokens, ends, before, back, sinks, qk_scale, True, HEAD_DIM, BLOCK_KV,
                    BLOCK_MASKED, PRECISION,
                )  # fmt: skip
                slot = stop
            tile += slot - slots  # 0, but unknown to the compiler: keeps the offsets below out of the loop's registers
    else:
        if counts_ptr is not None:
            counts_ptr += b * stride_nb
            mid = 0
        else:
            mid = kv_tokens // BLOCK_KV * BLOCK_KV
        acc = _dq_run(
            acc, q, dout, lse2, delta, 0, mid, kv_tokens, k_ptr + b * stride_kb + h * stride_kh,
            v_ptr + b * stride_vb + h * stride_vh, stride_kt, stride_vt, None, counts_ptr, first_frame, frame_tokens,
            t, 0, 0, 0, qk_scale, False, HEAD_DIM, BLOCK_KV, BLOCK_MASKED, PRECISION,
        )  # fmt: skip
    t = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = t < q_tokens
    dense = ((b * q_tokens + t.to(tl.int64)[:, None]) * H + h) * HEAD_DIM + dims[None, :]
    tl.store(dq_ptr + dense, (acc * dq_scale).to(dq_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def _dkdv_run(
    dk, dv, k, v, bias, lo, mid, hi, q_ptr, dout_ptr, lse2_ptr, delta_ptr, stride_qt, stride_dt, q_frames_ptr,
    first_frame, frame_tokens, origin, frames_per_block, frames, before, back, sink_end, qk_scale,
    KEYS: tl.constexpr, COUNTS: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries lo..mid in whole tiles without a mask, mid..hi in smaller ones with a mask: it takes registers."""
    offs = tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    q_offs, d_offs = offs[:, None] * stride_qt + dims, offs[:, None] * stride_dt + dims
    for start in tl.range(lo, mid, BLOCK_Q):
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
    offs = tl.arange(0, BLOCK_MASKED)
    q_offs, d_offs = offs[:, None] * stride_qt + dims, offs[:, None] * stride_dt + dims
    for start in tl.range(mid, hi, BLOCK_MASKED):
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


@triton.jit(do_not_specialize=["q_tokens", "kv_tokens", "kv_tiles", *RULE])
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, q_frames_ptr, frames_ptr, windows_ptr, counts_ptr, dout_ptr, lse2_ptr, delta_ptr, dk_ptr,
    dv_ptr, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_qfb, stride_kfb, stride_nb, q_tokens, kv_tokens, kv_tiles, H, qk_scale, dk_scale,
    frame_tokens, frames_per_block, first_frame, origin, sink_frames, sink_end,
    KEYS: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one head and row; early keys, which most queries see, come first."""
    pid = tl.program_id(0)
    tile = pid % kv_tiles
    h = (pid // kv_tiles % H).to(tl.int64)
    b = (pid // kv_tiles // H).to(tl.int64)

    cols = tile * BLOCK_KV + tl.arange(0, BLOCK_KV)
    inside = cols < kv_tokens
    dims = tl.arange(0, HEAD_DIM)
    wide = cols.to(tl.int64)[:, None]
    k_offs = b * stride_kb + h * stride_kh + wide * stride_kt + dims[None, :]
    v_offs = b * stride_vb + h * stride_vh + wide * stride_vt + dims[None, :]
    used = inside
    bias = tl.zeros([BLOCK_KV], dtype=tl.float32)
    if counts_ptr is not None:
        count = tl.load(counts_ptr + b * stride_nb + cols, mask=inside, other=0).to(tl.float32)
        used = used & (count > 0)
        bias = tl.where(used, tl.log2(tl.where(used, count, 1.0)), float("-inf"))
    k = tl.load(k_ptr + k_offs, mask=used[:, None], other=0.0)
    v = tl.load(v_ptr + v_offs, mask=used[:, None], other=0.0)
    q_ptr += b * stride_qb + h * stride_qh
    dout_ptr += (b * q_tokens * H + h) * HEAD_DIM
    lse2_ptr += (b * H + h) * q_tokens
    delta_ptr += (b * H + h) * q_tokens
    stride_dt = H * HEAD_DIM

    dk = tl.zeros([BLOCK_KV, HEAD_DIM], dtype=tl.float32)
    dv = tl.zeros([BLOCK_KV, HEAD_DIM], dtype=tl.float32)
    if KEYS == EVERY:
        dk, dv = _dkdv_run(
            dk, dv, k, v, bias, 0, q_tokens // BLOCK_Q * BLOCK_Q, q_tokens, q_ptr, dout_ptr, lse2_ptr, delta_ptr,
            stride_qt, stride_dt, None, first_frame, frame_tokens, origin, frames_per_block, cols, 0, 0, 0, qk_scale,
            KEYS, counts_ptr is not None, NEED_DK, NEED_DV, HEAD_DIM, BLOCK_Q, BLOCK_MASKED, PRECISION,
        )  # fmt: skip
    else:
        if q_frames_ptr is not None:
            q_frames_ptr += b * stride_qfb
        if frames_ptr is not None:
            frames_ptr += b * stride_kfb
        frames = frame_at(frames_ptr, cols // frame_tokens, inside, first_frame)
        lowest, first, last = key_bounds(frames, inside)
        before, back, sinks = limits(windows_ptr, b, frames_per_block, sink_frames, sink_end, KEYS)
        slots = q_tokens // frame_tokens
        slot = 0
        while slot < slots:
            kind, stop = query_run(
                slot, slots, q_frames_ptr, first_frame, origin, frames_per_block, frames, inside, lowest, first, last,
                before, back, sinks,
            )  # fmt: skip
            lo = slot * frame_tokens
            hi = tl.where(kind == NONE, lo, stop * frame_tokens)
            mid = unmasked_until(lo, hi, kind, BLOCK_Q)
            dk, dv = _dkdv_run(
                dk, dv, k, v, bias, lo, mid, hi, q_ptr, dout_ptr, lse2_ptr, delta_ptr, stride_qt, stride_dt,
                q_frames_ptr, first_frame, frame_tokens, origin, frames_per_block, frames, before, back, sinks,
                qk_scale, KEYS, False, NEED_DK, NEED_DV, HEAD_DIM, BLOCK_Q, BLOCK_MASKED, PRECISION,
            )  # fmt: skip
            slot = stop
        tile += slot - slots  # 0, but unknown to the compiler: keeps the offsets below out of the loop's registers
    cols = tile * BLOCK_KV + tl.arange(0, BLOCK_KV)
    inside = cols < kv_tokens
    wide = cols.to(tl.int64)[:, None]
    dense = ((b * kv_tokens + wide) * H + h) * HEAD_DIM + dims[None, :]
    if NEED_DK:
        tl.store(dk_ptr + dense, (dk * dk_scale).to(dk_ptr.dtype.element_ty), mask=inside[:, None])
    if NEED_DV:
        tl.store(dv_ptr + dense, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None])


def launch(
    grads: list[Tensor],
    needed: list[bool],
    outputs: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    q_frames: Tensor | None,
    kv_frames: Tensor | None,
    context_frames: Tensor | None,
    kv_counts: Tensor | None,
    rule: list[int],
    windows: list[int],
    scale: float,
) -> list[Tensor]:
    """hiar::attention_backward: the gradients of those of q, k, v and the context's k and v that are needed."""
    check(q, k, v, context_k, context_v)
    b, length, h, d = q.shape
    given = [x for x in (q, k, v, context_k, context_v) if x is not None]
    found: list[Tensor | None] = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None for x, need in zip(given, needed)
    ]
    found += [None] * (5 - len(given))
    dout, dlse = (g.contiguous() for g in grads)
    out, lse = (x.contiguous() for x in outputs)
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    sign = 1.0
    if scale < 0:  # as the forward did
        q, scale, sign = -q, -scale, -1.0
    q_frames, kv_frames, context_frames = ids_of(q_frames, kv_frames, context_frames, rule, k)
    kv_counts = dense_rows(kv_counts)
    shared: dict[str, Any] = {
        **strides("q", q),
        **rule_arguments(rule, k.shape[1]),
        "stride_qfb": row_stride(q_frames),
        "q_tokens": length,
        "H": h,
        "qk_scale": scale * _LOG2E.value,
        "HEAD_DIM": d,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    on_device = windows_on(q.device, windows) if rule else None

    def key_gradients(
        keys: Tensor, values: Tensor, dk: Tensor | None, dv: Tensor | None, frames: Tensor | None, kind: int
    ) -> None:
        if (dk is None and dv is None) or keys.numel() == 0:
            return
        tile = tile_for(q, DKDV if rule else DKDV_UNMASKED)
        tiles = triton.cdiv(keys.shape[1], tile.kv)
        _attention_bwd_dkdv_kernel[(tiles * b * h,)](
            q, keys, values, q_frames, frames, on_device, kv_counts, dout, lse2, delta, dk, dv,
            **strides("k", keys), **strides("v", values), stride_kfb=row_stride(frames),
            stride_nb=row_stride(kv_counts), kv_tokens=keys.shape[1], kv_tiles=tiles, dk_scale=scale, KEYS=kind,
            NEED_DK=dk is not None, NEED_DV=dv is not None, **shared, **tile.options(),
        )  # fmt: skip

    with torch.cuda.device_of(q):
        if out.numel():
            tiles = triton.cdiv(length, 32)
            _attention_bwd_delta_kernel[(tiles * b * h,)](
                dout, out, lse, dlse, delta, lse2, length, tiles, h, HEAD_DIM=d, BLOCK_Q=32, num_warps=4
            )
        dq, dk, dv, context_dk, context_dv = found
        if dq is not None and dq.numel():
            tile = tile_for(q, DQ)
            tiles = triton.cdiv(length, tile.q)
            _attention_bwd_dq_kernel[(tiles * b * h,)](
                q, k, v, context_k, context_v, q_frames, kv_frames, context_frames, on_device, kv_counts, dout, lse2,
                delta, dq, **strides("k", k), **strides("v", v), **strides("ck", context_k),
                **strides("cv", context_v), stride_kfb=row_stride(kv_frames), stride_cfb=row_stride(context_frames),
                stride_nb=row_stride(kv_counts), kv_tokens=k.shape[1],
                context_tokens=0 if context_k is None else context_k.shape[1], q_tiles=tiles, dq_scale=sign * scale,
                MASKED=bool(rule), CONTEXT=context_k is not None, **shared, **tile.options(),
            )  # fmt: skip
        own = EVERY if not rule else SEEN if context_k is None else OWN
        key_gradients(k, v, dk, dv, kv_frames, own.value)
        if context_k is not None and context_v is not None:
            key_gradients(context_k, context_v, context_dk, context_dv, context_frames, EARLIER.value)
    return [x for x in found if x is not None]


register("attention_backward", launch)


def compile_cases(arch: int) -> list[Case]:
    """Wan 1.3B at 480 x 832: training over caches, block-causal, bidirectional."""
    frames = ("q_frames_ptr", "kv_frames_ptr", "frames_ptr", "windows_ptr")
    context = ("context_k_ptr", "context_v_ptr", "context_frames_ptr")

    def dq(name: str, pointers: tuple[str, ...]) -> Case:
        given = {"pointers": pointers, "MASKED": bool(pointers)}
        return production_case(name, _attention_bwd_dq_kernel, given, pick(DQ, arch))

    def dkdv(name: str, kind: Any, pointers: tuple[str, ...] = frames) -> Case:
        given = {"pointers": pointers, "KEYS": kind.value, "NEED_DK": True, "NEED_DV": True}
        tile = pick(DKDV_UNMASKED if kind.value == EVERY.value else DKDV, arch)
        return production_case(name, _attention_bwd_dkdv_kernel, given, tile)

    delta = production_case(
        "Wan 1.3B", _attention_bwd_delta_kernel, {"pointers": ()}, Tile(32, 32, 4, 1), tensor_cores=False
    )
    return [
        delta,
        dq("training over caches", (*frames, *context)),
        dq("block-causal", frames),
        dq("bidirectional", ()),
        dkdv("own keys beside caches", OWN),
        dkdv("caches with gradients", EARLIER),
        dkdv("block-causal", SEEN),
        dkdv("bidirectional", EVERY, ()),
    ]
