# mypy: allow-incomplete-defs
"""attention in Triton: forward."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compile import Case
from .._triton import register
from ..merge_attention.triton_fwd import merge
from ._launch import (
    FORWARD,
    FORWARD_NARROW,
    RULE,
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
    NONE,
    frame_at,
    key_run,
    key_source,
    query_ends,
    sees,
    unmasked_until,
    visible_tokens,
)

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = 1.4426950408889634


@triton.jit
def _attend_run(
    acc, total, highest, q, lo, mid, hi, k_ptr, v_ptr, stride_kt, stride_vt, frames_ptr, counts_ptr, first_frame,
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
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        new = tl.maximum(highest, tl.max(scores, 1) * qk_scale)
        p = tl.exp2(scores * qk_scale - new[:, None])
        keep = tl.exp2(highest - new)
        total = total * keep + tl.sum(p, 1)
        v = tl.load(v_ptr + tl.cast(start, tl.int64) * stride_vt + v_offs)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        highest = new
    offs = tl.arange(0, BLOCK_MASKED)
    k_offs, v_offs = offs[:, None] * stride_kt + dims, offs[:, None] * stride_vt + dims
    for start in tl.range(mid, hi, BLOCK_MASKED):
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


@triton.jit(do_not_specialize=["q_tokens", "kv_tokens", "context_tokens", "q_tiles", "rows", *RULE])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, context_k_ptr, context_v_ptr, q_frames_ptr, kv_frames_ptr, context_frames_ptr, windows_ptr,
    counts_ptr, out_ptr, lse_ptr, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_ckb, stride_ckt, stride_ckh, stride_cvb, stride_cvt, stride_cvh,
    stride_qfb, stride_kfb, stride_cfb, stride_nb, q_tokens, kv_tokens, context_tokens, q_tiles, rows, H, qk_scale,
    frame_tokens, frames_per_block, first_frame, origin, sink_frames, sink_end,
    MASKED: tl.constexpr, CONTEXT: tl.constexpr, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head and row; the last tiles, which see most of a causal video, come first."""
    pid = tl.program_id(0)
    tile = q_tiles - 1 - pid % q_tiles
    split = pid // q_tiles % SPLITS
    h = (pid // q_tiles // SPLITS % H).to(tl.int64)
    b = (pid // q_tiles // SPLITS // H).to(tl.int64)

    t = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = t < q_tokens
    dims = tl.arange(0, HEAD_DIM)
    wide = t.to(tl.int64)[:, None]
    q_offs = b * stride_qb + h * stride_qh + wide * stride_qt + dims[None, :]
    q = tl.load(q_ptr + q_offs, mask=live[:, None], other=0.0)

    acc = tl.zeros([BLOCK_Q, HEAD_DIM], dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    highest = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    if MASKED:
        if q_frames_ptr is not None:
            q_frames_ptr += b * stride_qfb
        ends, least, greatest = query_ends(q_frames_ptr, t, live, first_frame, frame_tokens, origin, frames_per_block)
        position = 0  # keys, of those that the tile sees, before this run
        first_key = 0
        last_key = 0
        if SPLITS > 1:
            for n in range(1 - CONTEXT, 2):
                _, _, _, _, frames_ptr, tokens, before, back, sinks = key_source(
                    tl.cast(n, tl.int32) == 1, b, h, k_ptr, v_ptr, kv_frames_ptr, stride_kb, stride_kt, stride_kh,
                    stride_vb, stride_vt, stride_vh, stride_kfb, kv_tokens, context_k_ptr, context_v_ptr,
                    context_frames_ptr, stride_ckb, stride_ckt, stride_ckh, stride_cvb, stride_cvt, stride_cvh,
                    stride_cfb, context_tokens, windows_ptr, frames_per_block, sink_frames, sink_end, CONTEXT,
                )  # fmt: skip
                last_key += visible_tokens(
                    tokens // frame_tokens, frames_ptr, first_frame, frame_tokens, ends, live, least, greatest, before,
                    back, sinks,
                )  # fmt: skip
            share = tl.cdiv(tl.cdiv(last_key, SPLITS), BLOCK_KV) * BLOCK_KV
            first_key = split * share
            last_key = first_key + share
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
                if SPLITS > 1:
                    begin = lo - position
                    position += hi - lo
                    hi = tl.minimum(hi, begin + last_key)
                    lo = tl.minimum(tl.maximum(lo, begin + first_key), tl.maximum(hi, lo))
                mid = unmasked_until(lo, tl.maximum(lo, hi), kind, BLOCK_KV)
                acc, total, highest = _attend_run(
                    acc, total, highest, q, lo, mid, hi, run_k_ptr, run_v_ptr, run_kt, run_vt, frames_ptr, None,
                    first_frame, frame_tokens, ends, before, back, sinks, qk_scale, True, HEAD_DIM, BLOCK_KV,
                    BLOCK_MASKED, PRECISION,
                )  # fmt: skip
                slot = stop
            tile += slot - slots  # 0, but unknown to the compiler: keeps the offsets below out of the loop's registers
    else:
        lo = 0
        hi = kv_tokens
        if SPLITS > 1:
            share = tl.cdiv(tl.cdiv(kv_tokens, SPLITS), BLOCK_KV) * BLOCK_KV
            lo = tl.minimum(split * share, kv_tokens)
            hi = tl.minimum(lo + share, kv_tokens)
        mid = lo + (hi - lo) // BLOCK_KV * BLOCK_KV
        if counts_ptr is not None:
            counts_ptr += b * stride_nb
            mid = lo
        acc, total, highest = _attend_run(
            acc, total, highest, q, lo, mid, hi, k_ptr + b * stride_kb + h * stride_kh,
            v_ptr + b * stride_vb + h * stride_vh, stride_kt, stride_vt, None, counts_ptr, first_frame, frame_tokens,
            t, 0, 0, 0, qk_scale, False, HEAD_DIM, BLOCK_KV, BLOCK_MASKED, PRECISION,
        )  # fmt: skip

    nothing = total == 0.0  # the greatest score alone adds 1
    total = tl.where(nothing, 1.0, total)
    t = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = t < q_tokens
    out_offs = (((split * rows + b) * q_tokens + t.to(tl.int64)[:, None]) * H + h) * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_offs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None])
    lse = tl.where(nothing, float("-inf"), (highest + tl.log2(total)) * _LN2)
    tl.store(lse_ptr + ((split * rows + b) * H + h) * q_tokens + t, lse, mask=live)


def splits_for(tiles: int, keys: int, processors: int, most: int = 4, least_keys: int = 2048) -> int:
    """Into how many parts to cut the keys, so that the last wave of tiles leaves few processors idle.

    A wave takes 1/n of the time with n parts; every part more costs about two percent: partial outputs and the merge.
    """

    def cost(n: int) -> float:
        return -(-tiles * n // processors) / n * (1 + 0.02 * (n - 1))

    return min((n for n in range(1, most + 1) if n == 1 or keys >= n * least_keys), key=cost)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
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
    splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """hiar::attention; ``splits`` 0: as many as fill the device."""
    check(q, k, v, context_k, context_v)
    b, length, h, d = q.shape
    tile = tile_for(q, FORWARD if d == 128 else FORWARD_NARROW)
    tiles = triton.cdiv(length, tile.q)
    keys = k.shape[1] + (0 if context_k is None else context_k.shape[1])
    if not splits:
        splits = splits_for(tiles * b * h, keys, _processors(q.device)) if q.is_cuda else 1
    shape, partial = (q.shape, q.dtype) if splits == 1 else ((splits, *q.shape), torch.float32)
    out = torch.empty(shape, dtype=partial, device=q.device)
    lse = torch.empty((*shape[:-4], b, h, length), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return (out, lse) if splits == 1 else (out[0].to(q.dtype), lse[0])
    if scale < 0:  # the kernel scales after it took the greatest score
        q, scale = -q, -scale
    q_frames, kv_frames, context_frames = ids_of(q_frames, kv_frames, context_frames, rule, k)
    kv_counts = dense_rows(kv_counts)
    with torch.cuda.device_of(q):
        _attention_fwd_kernel[(tiles * splits * b * h,)](
            q, k, v, context_k, context_v, q_frames, kv_frames, context_frames,
            windows_on(q.device, windows) if rule else None, kv_counts, out, lse,
            **strides("q", q), **strides("k", k), **strides("v", v), **strides("ck", context_k),
            **strides("cv", context_v), stride_qfb=row_stride(q_frames), stride_kfb=row_stride(kv_frames),
            stride_cfb=row_stride(context_frames), stride_nb=row_stride(kv_counts), q_tokens=length,
            kv_tokens=k.shape[1], context_tokens=keys - k.shape[1], q_tiles=tiles, rows=b, H=h,
            qk_scale=scale * _LOG2E, **rule_arguments(rule, k.shape[1]), MASKED=bool(rule),
            CONTEXT=context_k is not None, SPLITS=splits, HEAD_DIM=d,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **tile.options(),
        )  # fmt: skip
    return (out, lse) if splits == 1 else merge(out, lse, q.dtype)


register("attention", launch)


def compile_cases(arch: int) -> list[Case]:
    """Wan 1.3B at 480 x 832: a visit over the ring, one split in two, training over caches, text, bidirectional."""

    def case(name: str, splits: int = 1, **given: Any) -> Case:
        return production_case(
            name,
            _attention_fwd_kernel,
            {"SPLITS": splits, **given},
            pick(FORWARD, arch),
            out="fp32" if splits > 1 else "",
        )

    frames = ("q_frames_ptr", "kv_frames_ptr", "windows_ptr")
    context = ("context_k_ptr", "context_v_ptr", "context_frames_ptr")
    return [
        case("ring of 21 frames", pointers=frames, MASKED=True),
        case("ring of 24 frames, keys split in two", 2, pointers=frames, MASKED=True),
        case("training over caches", pointers=(*frames, *context), MASKED=True),
        case("text with counts", pointers=("counts_ptr",), MASKED=False),
        case("bidirectional", pointers=(), MASKED=False),
    ]
