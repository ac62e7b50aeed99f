# mypy: allow-incomplete-defs
"""attention in Triton: forward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.triton_loader import FUSED, register
from ..merge_attention.triton_fwd import merge
from . import _launch
from ._runs import attend_rest, attend_whole
from ._visible import (
    COUNT,
    FULL,
    NONE,
    PARTIAL,
    REST,
    WHOLE,
    key_run,
    key_source,
    query_ends,
    source_frames,
    source_limits,
    unmasked_until,
)
from .inputs import AttentionInputs
from .schedule import multiprocessors

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["q_tokens", "kv_tokens", "context_tokens", "q_tiles", "rows", *_launch.RULE])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, context_k_ptr, context_v_ptr, q_frames_ptr, kv_frames_ptr, context_frames_ptr, windows_ptr,
    counts_ptr, out_ptr, lse_ptr, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_ckb, stride_ckt, stride_ckh, stride_cvb, stride_cvt, stride_cvh,
    stride_qfb, stride_kfb, stride_cfb, stride_nb, q_tokens, kv_tokens, context_tokens, q_tiles, rows, H, qk_scale,
    frame_tokens, frames_per_block, first_frame, origin, sink_frames, sink_end,
    MASKED: tl.constexpr, CONTEXT: tl.constexpr, NUM_SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_MASKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One tile of queries of one head and row; the last tiles, which see most of a causal video, come first."""
    pid = tl.program_id(0)
    tile = q_tiles - 1 - pid % q_tiles
    split = pid // q_tiles % NUM_SPLITS
    h = (pid // q_tiles // NUM_SPLITS % H).to(tl.int64)
    b = (pid // q_tiles // NUM_SPLITS // H).to(tl.int64)

    t = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_mask = t < q_tokens
    dims = tl.arange(0, HEAD_DIM)
    wide = t.to(tl.int64)[:, None]
    q_offs = b * stride_qb + h * stride_qh + wide * stride_qt + dims[None, :]
    q = tl.load(q_ptr + q_offs, mask=q_mask[:, None], other=0.0)

    acc = tl.zeros([BLOCK_Q, HEAD_DIM], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_Q], dtype=tl.float32)
    m_i = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    if MASKED:
        if q_frames_ptr is not None:
            q_frames_ptr += b * stride_qfb
        ends, least, greatest = query_ends(q_frames_ptr, t, q_mask, first_frame, frame_tokens, origin, frames_per_block)
    else:
        ends, least, greatest = t, 0, 0
        if counts_ptr is not None:
            counts_ptr += b * stride_nb
    first_key = 0  # of the keys that the tile sees, those of this split
    last_key = 0
    for phase in tl.static_range(WHOLE if NUM_SPLITS == 1 else COUNT, REST + 1):
        position = 0  # keys, of those that the tile sees, before this run
        for n in range(1 - CONTEXT, 2):
            own = tl.cast(n, tl.int32) == 1
            run_k_ptr, run_v_ptr, run_kt, run_vt, tokens = key_source(
                own, b, h, k_ptr, v_ptr, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, kv_tokens,
                context_k_ptr, context_v_ptr, stride_ckb, stride_ckt, stride_ckh, stride_cvb, stride_cvt, stride_cvh,
                context_tokens, CONTEXT,
            )  # fmt: skip
            frames_ptr = kv_frames_ptr
            if kv_frames_ptr is not None:
                frames_ptr = source_frames(own, b, kv_frames_ptr, stride_kfb, context_frames_ptr, stride_cfb, CONTEXT)
            before, back, sinks = 0, 0, 0
            if MASKED:
                before, back, sinks = source_limits(
                    own, windows_ptr, b, frames_per_block, sink_frames, sink_end, CONTEXT
                )
            slots = tokens // frame_tokens
            slot = 0
            while slot < slots:
                kind = FULL if counts_ptr is None else PARTIAL
                stop = slot + 1
                if MASKED:
                    kind, stop = key_run(
                        slot, slots, frames_ptr, first_frame, ends, q_mask, least, greatest, before, back, sinks
                    )
                lo = slot * frame_tokens
                hi = tl.where(kind == NONE, lo, stop * frame_tokens)
                if NUM_SPLITS > 1:
                    begin = lo - position
                    position += hi - lo
                    if phase != COUNT:
                        hi = tl.minimum(hi, begin + last_key)
                        lo = tl.minimum(tl.maximum(lo, begin + first_key), tl.maximum(hi, lo))
                mid = unmasked_until(lo, tl.maximum(lo, hi), kind, BLOCK_KV)
                if phase == WHOLE:
                    acc, l_i, m_i = attend_whole(
                        acc, l_i, m_i, q, lo, mid, run_k_ptr, run_v_ptr, run_kt, run_vt, qk_scale, HEAD_DIM,
                        BLOCK_KV, PRECISION,
                    )  # fmt: skip
                elif phase == REST:
                    acc, l_i, m_i = attend_rest(
                        acc, l_i, m_i, q, mid, hi, run_k_ptr, run_v_ptr, run_kt, run_vt, frames_ptr, counts_ptr,
                        first_frame, frame_tokens, ends, before, back, sinks, qk_scale, MASKED, HEAD_DIM, BLOCK_MASKED,
                        PRECISION,
                    )  # fmt: skip
                slot = stop
            tile += slot - slots  # 0, but unknown to the compiler: keeps the offsets below out of the loop's registers
        if phase == COUNT:
            share = tl.cdiv(tl.cdiv(position, NUM_SPLITS), BLOCK_KV) * BLOCK_KV
            first_key = split * share
            last_key = first_key + share

    empty = l_i == 0.0  # the maximum itself adds 1
    l_i = tl.where(empty, 1.0, l_i)
    t = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_mask = t < q_tokens
    out_offs = (((split * rows + b) * q_tokens + t.to(tl.int64)[:, None]) * H + h) * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_offs, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=q_mask[:, None])
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_i)) * _LN2)
    tl.store(lse_ptr + ((split * rows + b) * H + h) * q_tokens + t, lse, mask=q_mask)


def choose_num_splits(tiles: int, keys: int, processors: int, most_splits: int = 4, least_keys: int = 2048) -> int:
    """Into how many ranges to cut the keys, so that the last wave of tiles leaves few processors idle.

    A wave takes 1/n of the time with n ranges; every range more costs about two percent: partial outputs and the merge.
    """

    def cost(n: int) -> float:
        return -(-tiles * n // processors) / n * (1 + 0.02 * (n - 1))

    return min((n for n in range(1, most_splits + 1) if n == 1 or keys >= n * least_keys), key=cost)


def launch(*arguments: Any, config: _launch.Tile | None = None) -> tuple[Tensor, Tensor]:
    """hiar::attention; ``config`` replaces the pinned tile, for benchmarks."""
    call = AttentionInputs.from_schema(*arguments)
    _launch.check(call)
    q, k, mask, context = call.q, call.k, call.mask, call.context
    b, length, h, d = q.shape
    tile = config or _launch.tile_for(q, _launch.FORWARD)
    tiles = triton.cdiv(length, tile.q)
    context_tokens = 0 if context is None else context.k.shape[1]
    num_splits = tile.num_splits
    if not num_splits:
        keys = k.shape[1] + context_tokens
        num_splits = choose_num_splits(tiles * b * h, keys, multiprocessors(q.device)) if q.is_cuda else 1
    shape, partial = (q.shape, q.dtype) if num_splits == 1 else ((num_splits, *q.shape), torch.float32)
    out = torch.empty(shape, dtype=partial, device=q.device)
    lse = torch.empty((*shape[:-4], b, h, length), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return (out, lse) if num_splits == 1 else (out[0].to(q.dtype), lse[0])
    scale = call.softmax_scale
    if scale < 0:  # the kernel scales after taking the maximum
        q, scale = -q, -scale
    ids, kv_counts = _launch.device_ids(call), _launch.dense_rows(call.kv_counts)
    context_k, context_v = (None, None) if context is None else context.kv
    with torch.cuda.device_of(q):
        _attention_fwd_kernel[(tiles * num_splits * b * h,)](
            q, k, call.v, context_k, context_v, *ids.pointers, kv_counts, out, lse,
            **_launch.strides("q", q), **_launch.key_strides(call), **ids.strides,
            stride_nb=_launch.row_stride(kv_counts), q_tokens=length, kv_tokens=k.shape[1],
            context_tokens=context_tokens, q_tiles=tiles, rows=b, H=h,
            qk_scale=scale * _LOG2E, **_launch.rule_arguments(mask, k.shape[1]), MASKED=mask is not None,
            CONTEXT=context is not None, NUM_SPLITS=num_splits, HEAD_DIM=d,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **tile.options(), **FUSED,
        )  # fmt: skip
    return (out, lse) if num_splits == 1 else merge(out, lse, q.dtype)


register("attention", launch)


def _case(name: str, pointers: tuple[str, ...], tile: _launch.Tile, num_splits: int = 1) -> Case:
    constexprs = {"pointers": pointers, "MASKED": "windows_ptr" in pointers, "NUM_SPLITS": num_splits}
    return _launch.production_case(name, _attention_fwd_kernel, constexprs, tile, out="fp32" if num_splits > 1 else "")


_FRAMES = ("q_frames_ptr", "kv_frames_ptr", "windows_ptr")


def compile_cases(arch: int) -> list[Case]:
    """A block over a ring, one whose keys are split in two, training over caches, text, bidirectional."""
    context = ("context_k_ptr", "context_v_ptr", "context_frames_ptr")
    tile = _launch.pick(_launch.FORWARD, arch)
    return [
        _case("ring of 21 frames", _FRAMES, tile),
        _case("ring of 24 frames, keys split in two", _FRAMES, tile, 2),
        _case("training over caches", (*_FRAMES, *context), tile),
        _case("text with counts", ("counts_ptr",), tile),
        _case("bidirectional", (), tile),
    ]


def candidate_cases(arch: int) -> list[tuple[_launch.Tile, Case]]:
    """Configurations to measure, for a block over the ring."""
    tiles = _launch.CANDIDATES["forward"].get(arch, ())
    return [(tile, _case("candidate", _FRAMES, tile, tile.num_splits or 1)) for tile in tiles]
