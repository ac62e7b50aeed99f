# mypy: allow-incomplete-defs
"""attention in Gluon for Hopper (sm_90): forward over the key blocks of a schedule.

One CTA a multiprocessor: a producer warp brings tiles by TMA, two consumer warpgroups of 64 queries each multiply them
by asynchronous wgmma. P stays in registers; the softmax of a block runs beside the product P V of the block before.

Barriers, of two stages of K, two of V, and the two halves of Q:
    full    1 arrival, the producer's, which announces the bytes; the copy completes it
    empty   K, V: 2 arrivals, one of each consumer, once its product with the stage is done; Q: 1, of its consumer, once
            the last Q K of a segment is done
Each side counts the blocks it has handled: block n is in stage n % 2, in its phase (n // 2) % 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.aot import Case
from ..common.gluon_hopper import (
    CONSUMER_REGISTERS,
    LAUNCH_REGISTERS,
    PRODUCER_REGISTERS,
    by_slot,
    by_token,
    copy,
    descriptor_type,
    exp2,
    rescaled,
    row_max,
    row_sum,
    slot_stride,
)
from ..common.shapes import HEAD_DIM
from ..common.triton_loader import FUSED
from .schedule import BLOCK_FIELDS, BLOCK_KEYS, SEGMENT_FIELDS, TILE_QUERIES, AttentionSchedule
from .triton_schedule import merge_cuts

STAGES = 2
_ROWS = TILE_QUERIES // 2  # queries of a consumer
_D = gl.constexpr(HEAD_DIM)
_N = gl.constexpr(BLOCK_KEYS)
_R = gl.constexpr(_ROWS)
_T = gl.constexpr(TILE_QUERIES)
_STAGES = gl.constexpr(STAGES)
_BLOCK_FIELDS = gl.constexpr(BLOCK_FIELDS)
_SEGMENT_FIELDS = gl.constexpr(SEGMENT_FIELDS)
_LN2 = gl.constexpr(0.6931471805599453)
_LOG2E = 1.4426950408889634


@gluon.jit
def _stage(n):
    return n % _STAGES


@gluon.jit
def _phase(n):
    return (n // _STAGES) & 1


@gluon.jit
def _fetch(desc, slot_desc, block_ptr, masked, b, column, slot_stride, slot_tokens, smem, full, empty, n):
    """The n-th tile of K or V that this CTA loads."""
    start = gl.load(block_ptr)
    stage = _stage(n)
    mbarrier.wait(empty.index(stage), _phase(n) ^ 1)
    mbarrier.expect(full.index(stage), _N * _D * 2)
    if masked:  # from one frame slot: beyond its end come zeros, so that no NaN of another frame meets a zero of P
        slot = start // slot_tokens
        row = start - slot * slot_tokens
        row = gl.where(gl.load(block_ptr + 1) > start, row, slot_tokens)  # a block without keys is all zeros
        copy(slot_desc, [b * slot_stride + slot, row, column], full.index(stage), smem.index(stage))
    else:
        copy(desc, [b, start, column], full.index(stage), smem.index(stage))


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, k_slot_desc, v_slot_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, segments_ptr, segment_counts_ptr, blocks_ptr, most_segments, most_blocks, q_tiles, H, slot_stride,
    slot_tokens
):  # fmt: skip
    cta = gl.program_id(0)
    n = gl.to_tensor(0)  # blocks handled
    for s in range(gl.load(segment_counts_ptr + cta)):
        segment_ptr = segments_ptr + (cta * most_segments + s) * _SEGMENT_FIELDS
        tile = gl.load(segment_ptr)
        lo = gl.load(segment_ptr + 1)
        hi = gl.load(segment_ptr + 2)
        masked = gl.load(segment_ptr + 4)
        bh = tile // q_tiles
        b = bh // H
        column = (bh - b * H) * _D
        row = (tile - bh * q_tiles) * _T
        blocks = blocks_ptr + (b * q_tiles + tile - bh * q_tiles).to(gl.int64) * most_blocks * _BLOCK_FIELDS
        # K of the next block comes before V of this one: its product is issued first
        _fetch(
            k_desc, k_slot_desc, blocks + lo * _BLOCK_FIELDS, lo < masked, b, column, slot_stride, slot_tokens, k_smem,
            k_full, k_empty, n,
        )  # fmt: skip
        for w in gl.static_range(2):
            mbarrier.wait(q_empty.index(w), (s & 1) ^ 1)
            mbarrier.expect(q_full.index(w), _R * _D * 2)
            copy(q_desc, [b, row + w * _R, column], q_full.index(w), q_smem.index(w))
        for j in range(lo + 1, hi):
            _fetch(
                k_desc, k_slot_desc, blocks + j * _BLOCK_FIELDS, j < masked, b, column, slot_stride, slot_tokens,
                k_smem, k_full, k_empty, n + 1,
            )  # fmt: skip
            _fetch(
                v_desc, v_slot_desc, blocks + (j - 1) * _BLOCK_FIELDS, j - 1 < masked, b, column, slot_stride,
                slot_tokens, v_smem, v_full, v_empty, n,
            )  # fmt: skip
            n += 1
        _fetch(
            v_desc, v_slot_desc, blocks + (hi - 1) * _BLOCK_FIELDS, hi - 1 < masked, b, column, slot_stride,
            slot_tokens, v_smem, v_full, v_empty, n,
        )  # fmt: skip
        n += 1


@gluon.jit
def _masked_scores(q, k_smem, k_full, k_empty, n, zeros, block_ptr, limits_ptr, sink_end, qk_scale, WG: gl.constexpr):
    """Scaled scores of one block, -inf where a query does not see a key."""
    S: gl.constexpr = zeros.type.layout
    stage = _stage(n)
    start = gl.load(block_ptr)
    stop = gl.load(block_ptr + 1)
    frame = gl.load(block_ptr + 2)
    partial = gl.load(block_ptr + 3) != 0
    rows = WG * _R + gl.arange(0, _R, layout=gl.SliceLayout(1, S))
    cols = gl.arange(0, _N, layout=gl.SliceLayout(0, S))
    end = gl.load(limits_ptr + rows, mask=partial, other=0)
    low = gl.load(limits_ptr + _T + rows, mask=partial, other=0)
    sees = (frame < end) & ((frame >= low) | (frame < sink_end)) | (not partial)
    mbarrier.wait(k_full.index(stage), _phase(n))
    scores = warpgroup_mma(
        q, k_smem.index(stage).reshape([_N, _D]).permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    return gl.where(sees[:, None] & (cols < stop - start)[None, :], scores * qk_scale, float("-inf"))


@gluon.jit
def _soften(scores, m_i, l_i, LAYOUT: gl.constexpr):
    """One online-softmax step for rows that may have no visible key yet; returns P, alpha, m_i, l_i."""
    m_new = gl.maximum(m_i, row_max(scores, LAYOUT))
    base = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = exp2(scores - base[:, None])
    alpha = exp2(m_i - base)
    return p, alpha, m_new, l_i * alpha + row_sum(p, LAYOUT)


@gluon.jit
def _add_values(p, acc, v_smem, v_full, v_empty, n):
    """Add P V of the n-th block to acc and wait for the result."""
    stage = _stage(n)
    mbarrier.wait(v_full.index(stage), _phase(n))
    acc = warpgroup_mma(p, v_smem.index(stage).reshape([_N, _D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(stage), count=1)
    return acc


@gluon.jit
def _consumer(
    out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty,
    v_full, v_empty, segments_ptr, segment_counts_ptr, blocks_ptr, limits_ptr, most_segments, most_blocks, q_tiles, H,
    q_tokens, sink_end, qk_scale, WG: gl.constexpr
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _D, 16])  # noqa: E741
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O)
    HALF: gl.constexpr = out_ptr.dtype.element_ty
    cta = gl.program_id(0)
    q = q_smem.index(WG).reshape([_R, _D])
    zeros = gl.full([_R, _N], 0.0, gl.float32, S)
    n = gl.to_tensor(0)  # blocks handled
    for s in range(gl.load(segment_counts_ptr + cta)):
        segment_ptr = segments_ptr + (cta * most_segments + s) * _SEGMENT_FIELDS
        tile = gl.load(segment_ptr)
        lo = gl.load(segment_ptr + 1)
        hi = gl.load(segment_ptr + 2)
        slot = gl.load(segment_ptr + 3)
        masked = gl.load(segment_ptr + 4)
        bh = tile // q_tiles
        b = bh // H
        item_tile = b * q_tiles + tile - bh * q_tiles
        block_ptr = blocks_ptr + (item_tile.to(gl.int64) * most_blocks + lo) * _BLOCK_FIELDS
        row_limits = limits_ptr + item_tile.to(gl.int64) * 2 * _T
        m_i = gl.full([_R], float("-inf"), gl.float32, S_ROWS)
        l_i = gl.full([_R], 0.0, gl.float32, S_ROWS)
        acc = gl.full([_R, _D], 0.0, gl.float32, O)
        mbarrier.wait(q_full.index(WG), s & 1)
        # Blocks with a mask, all but the last one after the other. A segment without any begins with a whole block.
        first = gl.maximum(gl.minimum(masked, hi) - lo, 1)
        for _ in range(first - 1):
            scores = _masked_scores(q, k_smem, k_full, k_empty, n, zeros, block_ptr, row_limits, sink_end, qk_scale, WG)
            p, alpha, m_i, l_i = _soften(scores, m_i, l_i, S_ROWS)
            acc = acc * gl.convert_layout(alpha, O_ROWS)[:, None]
            acc = _add_values(gl.convert_layout(p.to(HALF), P), acc, v_smem, v_full, v_empty, n)
            block_ptr += _BLOCK_FIELDS
            n += 1
        scores = _masked_scores(q, k_smem, k_full, k_empty, n, zeros, block_ptr, row_limits, sink_end, qk_scale, WG)
        p, alpha, m_i, l_i = _soften(scores, m_i, l_i, S_ROWS)
        acc = acc * gl.convert_layout(alpha, O_ROWS)[:, None]
        p_half = gl.convert_layout(p.to(HALF), P)
        whole = hi - lo - first
        mbarrier.wait(k_full.index(_stage(n + 1)), _phase(n + 1), pred=whole > 0)
        for j in range(whole):
            # K of this block is there. Q K goes first, then P V of the block before; the softmax runs beside.
            k_stage = _stage(n + 1)
            v_stage = _stage(n)
            scores = warpgroup_mma(
                q, k_smem.index(k_stage).reshape([_N, _D]).permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(v_stage), _phase(n))
            product = warpgroup_mma(p_half, v_smem.index(v_stage).reshape([_N, _D]), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(k_empty.index(k_stage), count=1)
            n += 1
            m_new = gl.maximum(m_i, row_max(scores, S_ROWS) * qk_scale)
            alpha = exp2(m_i - m_new)
            m_i = m_new
            p = exp2(scores * qk_scale - m_i[:, None])
            l_i = l_i * alpha + row_sum(p, S_ROWS)
            # This wait is a border that ptxas does not move the wait for P V across: without it no softmax runs beside.
            mbarrier.wait(k_full.index(_stage(n + 1)), _phase(n + 1), pred=j + 1 < whole)
            acc, p_half = warpgroup_mma_wait(0, deps=(product, p_half))
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            acc = rescaled(acc, gl.convert_layout(alpha, O_ROWS))
            p_half = gl.convert_layout(p.to(HALF), P)
        mbarrier.arrive(q_empty.index(WG), count=1)
        acc = _add_values(p_half, acc, v_smem, v_full, v_empty, n)
        n += 1

        visible = l_i > 0
        safe = gl.where(visible, l_i, 1.0)
        acc = acc * gl.convert_layout(1.0 / safe, O_ROWS)[:, None]
        lse = gl.where(visible, m_i + gl.log2(safe), float("-inf"))
        dims = gl.arange(0, _D, layout=gl.SliceLayout(0, O))
        o_rows = WG * _R + gl.arange(0, _R, layout=O_ROWS)
        s_rows = WG * _R + gl.arange(0, _R, layout=S_ROWS)
        if slot < 0:
            row = (tile - bh * q_tiles) * _T
            base = ((b * q_tokens + row).to(gl.int64) * H + (bh - b * H)) * _D
            offsets = base + o_rows[:, None] * (H * _D) + dims[None, :]
            gl.store(out_ptr + offsets, acc.to(HALF), mask=(row + o_rows < q_tokens)[:, None])
            gl.store(lse_ptr + bh.to(gl.int64) * q_tokens + row + s_rows, lse * _LN2, mask=row + s_rows < q_tokens)
        else:
            gl.store(partial_out_ptr + slot.to(gl.int64) * (_T * _D) + o_rows[:, None] * _D + dims[None, :], acc)
            gl.store(partial_lse_ptr + slot * _T + s_rows, lse)


@gluon.jit(
    do_not_specialize=[
        "most_segments",
        "most_blocks",
        "q_tiles",
        "H",
        "q_tokens",
        "slot_stride",
        "slot_tokens",
        "sink_end",
    ]
)
def _attention_hopper_kernel(
    q_desc, k_desc, v_desc, k_slot_desc, v_slot_desc, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, segments_ptr,
    segment_counts_ptr, blocks_ptr, limits_ptr, most_segments, most_blocks, q_tiles, H, q_tokens, slot_stride,
    slot_tokens, sink_end, qk_scale
):  # fmt: skip
    HALF: gl.constexpr = out_ptr.dtype.element_ty
    q_smem = gl.allocate_shared_memory(HALF, [2, 1, _R, _D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(HALF, [_STAGES, 1, _N, _D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(HALF, [_STAGES, 1, _N, _D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (
                out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, q_smem, k_smem, v_smem, q_full, q_empty, k_full,
                k_empty, v_full, v_empty, segments_ptr, segment_counts_ptr, blocks_ptr, limits_ptr, most_segments,
                most_blocks, q_tiles, H, q_tokens, sink_end, qk_scale, 0
            )),
            (_consumer, (
                out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, q_smem, k_smem, v_smem, q_full, q_empty, k_full,
                k_empty, v_full, v_empty, segments_ptr, segment_counts_ptr, blocks_ptr, limits_ptr, most_segments,
                most_blocks, q_tiles, H, q_tokens, sink_end, qk_scale, 1
            )),
            (_producer, (
                q_desc, k_desc, v_desc, k_slot_desc, v_slot_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full,
                k_empty, v_full, v_empty, segments_ptr, segment_counts_ptr, blocks_ptr, most_segments, most_blocks,
                q_tiles, H, slot_stride, slot_tokens
            ))
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launch(q: Tensor, k: Tensor, v: Tensor, schedule: AttentionSchedule, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the key blocks of a schedule, without gradient.

    Args:
        q: [B, Tq, H, 128] bfloat16 or float16. k, v: [B, Tk, H, 128], dtype of q; what :func:`unfit` has nothing to say
            about. schedule: of these sizes.

    Returns:
        out [B, Tq, H, 128] contiguous, dtype of q; natural logsumexp [B, H, Tq] float32.
    """
    schedule.require_fits(q, k)
    if scale < 0:  # the kernel takes the maximum before it scales
        q, scale = -q, -scale
    outputs = schedule.outputs(HEAD_DIM, q.dtype)
    tokens = schedule.frame_tokens
    kv = slots = [by_token(x, BLOCK_KEYS) for x in (k, v)]
    stride = 1
    if k.shape[1] > tokens:  # else the end of the slot is that of the tensor
        slots, stride = [by_slot(x, tokens, BLOCK_KEYS) for x in (k, v)], slot_stride(k, tokens)
    with torch.cuda.device_of(q):
        _attention_hopper_kernel[(schedule.ctas,)](
            by_token(q, _ROWS), *kv, *slots, *outputs, *schedule.tables, stride, tokens,
            schedule.sink_end, scale * _LOG2E, num_warps=4, maxnreg=LAUNCH_REGISTERS, **FUSED,
        )  # fmt: skip
        merge_cuts(schedule, *outputs)
    return outputs[:2]


def compile_cases(arch: int) -> list[Case]:
    """Hopper (sm_90) only."""
    if arch != 90:
        return []
    types = dict.fromkeys(("lse_ptr", "partial_out_ptr", "partial_lse_ptr"), "*fp32")
    types |= {"out_ptr": "*bf16", "qk_scale": "fp32"}
    for name in ("q_desc", "k_desc", "v_desc", "k_slot_desc", "v_slot_desc"):
        rows = _ROWS if name == "q_desc" else BLOCK_KEYS
        types[name] = descriptor_type("bf16", rows)
    options = {"tensor_cores": True, "max_registers": LAUNCH_REGISTERS}
    return [Case.of("ring of 21 frames", _attention_hopper_kernel, types, {}, (), **options)]
