# mypy: allow-incomplete-defs
"""The tables of :mod:`.schedule`, and the merge of what a schedule cut, in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.shapes import HEAD_DIM
from ..common.triton_loader import FUSED
from ._launch import RULE, dense_rows, row_stride, rule_arguments, windows_on
from ._visible import FULL, NONE, PARTIAL, SEEN, frame_at, key_run, limits, query_ends
from .mask import BlockCausal
from .schedule import (
    BLOCK_FIELDS,
    BLOCK_KEYS,
    SEGMENT_FIELDS,
    TILE_QUERIES,
    AttentionSchedule,
    allocate,
    multiprocessors,
)

_BLOCK_FIELDS = tl.constexpr(BLOCK_FIELDS)
_SEGMENT_FIELDS = tl.constexpr(SEGMENT_FIELDS)
_LN2 = tl.constexpr(0.6931471805599453)
_MERGED_ROWS = 16


@triton.jit
def _write_blocks(table_ptr, at, lo, hi, frame, partial, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Keys lo..hi as blocks from number ``at`` on; returns the number after them."""
    n = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK)
    for first in range(0, n, CHUNK):
        i = first + tl.arange(0, CHUNK)
        start = lo + i * BLOCK
        entry = table_ptr + (at + i) * _BLOCK_FIELDS
        tl.store(entry, start, mask=i < n)
        tl.store(entry + 1, tl.minimum(start + BLOCK, hi), mask=i < n)
        tl.store(entry + 2, frame + i * 0, mask=i < n)
        tl.store(entry + 3, partial + i * 0, mask=i < n)
    return at + n


@triton.jit(do_not_specialize=["q_tokens", "kv_tokens", "q_tiles", "most", *RULE])
def _key_blocks_kernel(
    blocks_ptr, counts_ptr, limits_ptr, q_frames_ptr, kv_frames_ptr, windows_ptr, stride_qfb, stride_kfb, q_tokens,
    kv_tokens, q_tiles, most, frame_tokens, frames_per_block, first_frame, origin, sink_frames, sink_end,
    MASKED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ONE_SLOT: tl.constexpr
):  # fmt: skip
    """The key blocks that one tile of queries sees: first those that need a mask, then the whole ones.

    ONE_SLOT: none leaves its frame slot, and a whole one names its slot in place of a frame.
    """
    pid = tl.program_id(0)
    b = (pid // q_tiles).to(tl.int64)
    row = tl.arange(0, TILE)
    t = pid % q_tiles * TILE + row
    q_mask = t < q_tokens
    table_ptr = blocks_ptr + pid.to(tl.int64) * most * _BLOCK_FIELDS
    limits_ptr += pid.to(tl.int64) * 2 * TILE
    before, back, sinks = 0, 0, 0
    ends, least, greatest = t, 0, 0
    if MASKED:
        if q_frames_ptr is not None:
            q_frames_ptr += b * stride_qfb
        ends, least, greatest = query_ends(q_frames_ptr, t, q_mask, first_frame, frame_tokens, origin, frames_per_block)
        before, back, sinks = limits(windows_ptr, b, frames_per_block, sink_frames, sink_end, SEEN)
        tl.store(limits_ptr + row, ends)
        tl.store(limits_ptr + TILE + row, ends - back)
        if kv_frames_ptr is not None:
            kv_frames_ptr += b * stride_kfb
    slots = kv_tokens // frame_tokens
    at = 0
    masked = 0
    for phase in tl.static_range(2):
        slot = 0
        while slot < slots:
            kind = FULL
            stop = slots
            if MASKED:
                kind, stop = key_run(
                    slot, slots, kv_frames_ptr, first_frame, ends, q_mask, least, greatest, before, back, sinks
                )
            if ONE_SLOT:
                while slot < stop:
                    begin = slot * frame_tokens
                    end = begin + frame_tokens
                    middle = begin + frame_tokens // BLOCK * BLOCK
                    if phase == 0:
                        frame = 0
                        if MASKED:
                            frame = frame_at(kv_frames_ptr, slot, slot < slots, first_frame)
                        begin = tl.where(kind == FULL, middle, tl.where(kind == NONE, end, begin))
                        at = _write_blocks(
                            table_ptr, at, begin, end, frame, (kind == PARTIAL).to(tl.int32), BLOCK, CHUNK
                        )
                    elif kind == FULL:
                        at = _write_blocks(table_ptr, at, begin, middle, slot, 0, BLOCK, CHUNK)
                    slot += 1
            else:
                lo = slot * frame_tokens
                hi = stop * frame_tokens
                middle = lo + (hi - lo) // BLOCK * BLOCK
                if phase == 0:
                    # each inside one slot: what a load beyond the slot's end brings is then zeros, never another frame
                    begin = tl.where(kind == FULL, middle, tl.where(kind == NONE, hi, lo))
                    while begin < hi:
                        of = begin // frame_tokens
                        end = tl.minimum(hi, (of + 1) * frame_tokens)
                        frame = 0
                        if MASKED:
                            frame = frame_at(kv_frames_ptr, of, of < slots, first_frame)
                        at = _write_blocks(
                            table_ptr, at, begin, end, frame, (kind == PARTIAL).to(tl.int32), BLOCK, CHUNK
                        )
                        begin = end
                elif kind == FULL:
                    at = _write_blocks(table_ptr, at, lo, middle, 0, 0, BLOCK, CHUNK)
            slot = stop
        if phase == 0:
            masked = at
    if at == 0:  # nothing visible: one block without keys, so that zeros are written
        at = _write_blocks(table_ptr, at, 0, 1, 0, 0, BLOCK, CHUNK)
        tl.store(table_ptr + 1, 0)
        masked = at
    tl.store(counts_ptr + pid * 2, masked)
    tl.store(counts_ptr + pid * 2 + 1, at)


@triton.jit
def _write_segments(ptr, tile, lo, hi, slot, masked, mask):
    tl.store(ptr, tile, mask=mask)
    tl.store(ptr + 1, lo, mask=mask)
    tl.store(ptr + 2, hi, mask=mask)
    tl.store(ptr + 3, slot, mask=mask)
    tl.store(ptr + 4, masked, mask=mask)


@triton.jit(do_not_specialize=["rounds", "rest", "q_tiles", "H", "most"])
def _segments_kernel(
    counts_ptr, segments_ptr, segment_counts_ptr, cuts_ptr, rounds, rest, q_tiles, H, most, CTAS: tl.constexpr,
    REST: tl.constexpr
):  # fmt: skip
    """The work of one CTA: whole tiles, then its range of the key blocks of the tiles that are left."""
    c = tl.program_id(0)
    segments_ptr += c * most * _SEGMENT_FIELDS
    for r in range(rounds):
        tile = r * CTAS + c
        count_ptr = counts_ptr + (tile // q_tiles // H * q_tiles + tile % q_tiles) * 2
        n = tl.load(count_ptr + 1)
        _write_segments(segments_ptr + r * _SEGMENT_FIELDS, tile, 0, n, -1, tl.load(count_ptr), True)
    i = tl.arange(0, REST)
    left = i < rest
    tile = rounds * CTAS + i
    count_ptr = counts_ptr + (tile // q_tiles // H * q_tiles + tile % q_tiles) * 2
    masked = tl.load(count_ptr, mask=left, other=0)
    n = tl.load(count_ptr + 1, mask=left, other=0)
    ahead = tl.cumsum(n, 0) - n
    units = tl.sum(n, 0)
    start = c * units // CTAS
    end = (c + 1) * units // CTAS
    lo = tl.maximum(start - ahead, 0)
    hi = tl.minimum(end - ahead, n)
    mine = left & (hi > lo)
    place = rounds + tl.cumsum(mine.to(tl.int32), 0) - 1
    slot = tl.where(hi - lo < n, 2 * c + (start < ahead).to(tl.int32), -1)
    _write_segments(segments_ptr + place * _SEGMENT_FIELDS, tile, lo, hi, slot, masked, mine)
    tl.store(segment_counts_ptr + c, rounds + tl.sum(mine.to(tl.int32), 0))
    if c == 0:
        tl.store(cuts_ptr + i * 2, ahead, mask=left)
        tl.store(cuts_ptr + i * 2 + 1, n, mask=left)


@triton.jit(do_not_specialize=["rounds", "rest", "q_tiles", "H", "q_tokens"])
def _merge_cuts_kernel(
    partial_out_ptr, partial_lse_ptr, cuts_ptr, out_ptr, lse_ptr, rounds, rest, q_tiles, H, q_tokens,
    CTAS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Rows of one tile that several CTAs shared: their partial results, weighted by their logsumexps (to base 2)."""
    i = tl.program_id(0)
    units = tl.load(cuts_ptr + (rest - 1) * 2) + tl.load(cuts_ptr + (rest - 1) * 2 + 1)
    ahead = tl.load(cuts_ptr + i * 2)
    n = tl.load(cuts_ptr + i * 2 + 1)
    first = ((ahead + 1) * CTAS - 1) // units  # the CTA that has the tile's first key block, its last one
    last = ((ahead + n) * CTAS - 1) // units
    if last > first:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        dims = tl.arange(0, HEAD_DIM)
        m_i = tl.full([ROWS], float("-inf"), tl.float32)
        l_i = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        for c in range(first, last + 1):
            start = c * units // CTAS
            if (c + 1) * units // CTAS > start:
                slot = (2 * c + (start < ahead).to(tl.int32)).to(tl.int64)
                lse = tl.load(partial_lse_ptr + slot * TILE + row)
                x = tl.load(partial_out_ptr + (slot * TILE + row[:, None]) * HEAD_DIM + dims[None, :])
                m_new = tl.maximum(m_i, lse)
                base = tl.where(m_new == float("-inf"), 0.0, m_new)
                alpha = tl.exp2(m_i - base)
                weight = tl.exp2(lse - base)
                acc = acc * alpha[:, None] + x * weight[:, None]
                l_i = l_i * alpha + weight
                m_i = m_new
        tile = rounds * CTAS + i
        bh = tile // q_tiles
        t = tile % q_tiles * TILE + row
        q_mask = t < q_tokens
        visible = l_i > 0
        l_i = tl.where(visible, l_i, 1.0)
        out = acc / l_i[:, None]
        out_offs = ((bh // H).to(tl.int64) * q_tokens + t) * H + bh % H
        tl.store(
            out_ptr + out_offs[:, None] * HEAD_DIM + dims[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=q_mask[:, None],
        )
        lse = tl.where(visible, (m_i + tl.log2(l_i)) * _LN2, float("-inf"))
        tl.store(lse_ptr + bh.to(tl.int64) * q_tokens + t, lse, mask=q_mask)


def make(
    shape: tuple[int, int, int, int],
    mask: BlockCausal | None,
    q_frames: Tensor | None,
    kv_frames: Tensor | None,
    device: torch.device,
    ctas: int | None,
    one_slot: bool = False,
) -> AttentionSchedule:
    """:func:`hiar_kernels.attention_schedule`."""
    batch, queries, heads, keys = shape
    arguments = rule_arguments(mask, keys)
    ctas = ctas or multiprocessors(device)
    tables = allocate(shape, arguments["frame_tokens"], arguments["sink_end"], device, ctas, one_slot)
    q_frames, kv_frames = (None if x is None else dense_rows(x.to(torch.int32)) for x in (q_frames, kv_frames))
    with torch.cuda.device_of(tables.blocks):
        _key_blocks_kernel[(batch * tables.q_tiles,)](
            tables.blocks, tables.counts, tables.limits, q_frames, kv_frames,
            None if mask is None else windows_on(device, mask, batch), row_stride(q_frames), row_stride(kv_frames),
            queries, keys,
            tables.q_tiles, tables.blocks.shape[2], **arguments, MASKED=mask is not None, TILE=TILE_QUERIES,
            BLOCK=BLOCK_KEYS, CHUNK=128, ONE_SLOT=one_slot, num_warps=4, **FUSED,
        )  # fmt: skip
        rounds, rest = divmod(batch * heads * tables.q_tiles, tables.ctas)
        _segments_kernel[(tables.ctas,)](
            tables.counts, tables.segments, tables.segment_counts, tables.cuts, rounds, rest, tables.q_tiles, heads,
            tables.segments.shape[1], CTAS=tables.ctas, REST=max(16, triton.next_power_of_2(rest)), num_warps=4,
            **FUSED,
        )  # fmt: skip
    return tables


def merge_cuts(tables: AttentionSchedule, out: Tensor, lse: Tensor, partial_out: Tensor, partial_lse: Tensor) -> None:
    """Write the tiles that several CTAs shared into out and lse, of :meth:`.AttentionSchedule.outputs`; partial_lse is
    to base 2.
    """
    rest = tables.cuts.shape[0]
    if not rest:
        return
    _, queries, heads, dim = out.shape
    rounds = (out.shape[0] * heads * tables.q_tiles - rest) // tables.ctas
    with torch.cuda.device_of(out):
        _merge_cuts_kernel[(rest, TILE_QUERIES // _MERGED_ROWS)](
            partial_out, partial_lse, tables.cuts, out, lse, rounds, rest, tables.q_tiles, heads, queries,
            CTAS=tables.ctas, TILE=TILE_QUERIES, ROWS=_MERGED_ROWS, HEAD_DIM=dim, num_warps=4, **FUSED,
        )  # fmt: skip


def compile_cases(arch: int) -> list[Case]:
    """A block over a ring of 21 frames on 132 SMs: made for sm_90, plain enough for all."""
    types = {"partial_out_ptr": "*fp32", "partial_lse_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32"}
    blocks = {"MASKED": True, "TILE": TILE_QUERIES, "BLOCK": BLOCK_KEYS, "CHUNK": 128}
    kernels: list[tuple[str, Any, dict[str, Any]]] = [
        ("", _key_blocks_kernel, {**blocks, "ONE_SLOT": False}),
        (", blocks of one slot", _key_blocks_kernel, {**blocks, "ONE_SLOT": True}),
        ("", _segments_kernel, {"CTAS": 132, "REST": 64}),
        ("", _merge_cuts_kernel, {"CTAS": 132, "TILE": TILE_QUERIES, "ROWS": _MERGED_ROWS, "HEAD_DIM": HEAD_DIM}),
    ]
    return [Case.of(f"ring of 21 frames{more}", kernel, types, values, ()) for more, kernel, values in kernels]
