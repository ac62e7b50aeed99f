# mypy: allow-incomplete-defs
"""attention_fp8 in Gluon for Hopper (sm_90): products of 8-bit numbers over the key blocks of a schedule.

The roles and barriers of ``attention/gluon_fwd.py``: a producer warp brings tiles by TMA, two consumer warpgroups of 64
queries each multiply them by asynchronous wgmma, P from registers, the softmax of a block beside the product P V of the
block before. What differs:

- A block lies inside one frame slot, so it has one scale of K and one of V.
- V is stored transposed, with keys permuted inside groups of 16 (:mod:`..common.float8`): the accumulators of Q K^T
  are the 8-bit operand as they lie, and P moves between no registers.
- P V of a block goes to accumulators of its own and is added in float32: the tensor cores of sm_90 keep some 14 bits of
  a running sum of 8-bit products, and over the thousand steps of a long ring the lost ones would add up.
- A block of at most 32 keys, the end of a slot, is multiplied as such: 24 of 1560 keys in Wan's frames.

Barriers, of the stages of K and of V, and the two halves of Q:
    full    1 arrival, the producer's, which announces the bytes; the copy completes it
    empty   K, V: 2 arrivals, one of each consumer, once its product with the stage is done; Q: 1, of its consumer, once
            the last Q K of a segment is done
"""

from __future__ import annotations

import math

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

from ..attention.schedule import BLOCK_FIELDS, BLOCK_KEYS, SEGMENT_FIELDS, TILE_QUERIES, AttentionSchedule
from ..attention.triton_schedule import merge_cuts
from ..common.aot import Case
from ..common.gluon_hopper import (
    CONSUMER_REGISTERS,
    LAUNCH_REGISTERS,
    PRODUCER_REGISTERS,
    by_slot,
    by_token,
    copy,
    descriptor,
    descriptor_type,
    exp2,
    exp2_partly_by_polynomial,
    rescaled,
    row_max,
    row_sum,
    slot_stride,
)
from ..common.shapes import HEAD_DIM, steps
from ..common.triton_loader import FUSED
from .inputs import P_SCALE, Float8Inputs

_ROWS = TILE_QUERIES // 2  # queries of a consumer
_D = gl.constexpr(HEAD_DIM)
_N = gl.constexpr(BLOCK_KEYS)
_R = gl.constexpr(_ROWS)
_T = gl.constexpr(TILE_QUERIES)
_TAIL = gl.constexpr(32)  # keys of a narrow block
_BLOCK_FIELDS = gl.constexpr(BLOCK_FIELDS)
_SEGMENT_FIELDS = gl.constexpr(SEGMENT_FIELDS)
_LN2 = gl.constexpr(0.6931471805599453)
_SHIFT = gl.constexpr(math.log2(P_SCALE))
_LOG2E = 1.4426950408889634


@gluon.jit
def _phase(n, STAGES: gl.constexpr):
    return (n // STAGES) & 1


@gluon.jit
def _fetch(desc, at, scale_ptr, slot, H, row, smem, scale_smem, full, empty, n, STAGES: gl.constexpr):
    """The n-th tile of K or V that this CTA loads, and its scale, which the arrival on ``full`` publishes."""
    stage = n % STAGES
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    scale = gl.full([1], 0.0, gl.float32, one) + gl.load(scale_ptr + slot * H, mask=row >= 0, other=1.0)
    mbarrier.wait(empty.index(stage), _phase(n, STAGES) ^ 1)
    scale_smem.index(stage).store(scale)
    mbarrier.expect(full.index(stage), _N * _D)
    copy(desc, at, full.index(stage), smem.index(stage))


@gluon.jit
def _place(block_ptr, slot_tokens):
    """Slot of a block and the row in it where it begins; a block without keys is all zeros, with a scale of 1."""
    start = gl.load(block_ptr)
    slot = start // slot_tokens
    row = start - slot * slot_tokens
    return slot, gl.where(gl.load(block_ptr + 1) > start, row, -_N)


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, k_scales_ptr, v_scales_ptr, q_smem, k_smem, v_smem, k_scale_smem, v_scale_smem, q_full,
    q_empty, k_full, k_empty, v_full, v_empty, segments_ptr, segment_counts_ptr, blocks_ptr, most_segments, most_blocks,
    q_tiles, H, slot_stride, slot_tokens, stride_ks, stride_vs, STAGES: gl.constexpr
):  # fmt: skip
    cta = gl.program_id(0)
    n = gl.to_tensor(0)  # blocks handled
    for s in range(gl.load(segment_counts_ptr + cta)):
        segment_ptr = segments_ptr + (cta * most_segments + s) * _SEGMENT_FIELDS
        tile = gl.load(segment_ptr)
        lo = gl.load(segment_ptr + 1)
        hi = gl.load(segment_ptr + 2)
        bh = tile // q_tiles
        b = bh // H
        h = bh - b * H
        first_row = (tile - bh * q_tiles) * _T
        blocks = blocks_ptr + (b * q_tiles + tile - bh * q_tiles).to(gl.int64) * most_blocks * _BLOCK_FIELDS
        k_scales = k_scales_ptr + b.to(gl.int64) * stride_ks + h
        v_scales = v_scales_ptr + b.to(gl.int64) * stride_vs + h
        # K of the next block comes before V of this one: its product is issued first
        slot, row = _place(blocks + lo * _BLOCK_FIELDS, slot_tokens)
        _fetch(
            k_desc, [b * slot_stride + slot, row, h * _D], k_scales, slot, H, row, k_smem, k_scale_smem, k_full,
            k_empty, n, STAGES,
        )  # fmt: skip
        for w in gl.static_range(2):
            mbarrier.wait(q_empty.index(w), (s & 1) ^ 1)
            mbarrier.expect(q_full.index(w), _R * _D)
            copy(q_desc, [b, first_row + w * _R, h * _D], q_full.index(w), q_smem.index(w))
        for j in range(lo + 1, hi):
            next_slot, next_row = _place(blocks + j * _BLOCK_FIELDS, slot_tokens)
            _fetch(
                k_desc, [b * slot_stride + next_slot, next_row, h * _D], k_scales, next_slot, H, next_row, k_smem,
                k_scale_smem, k_full, k_empty, n + 1, STAGES,
            )  # fmt: skip
            _fetch(
                v_desc, [b, (slot * H + h) * _D, row], v_scales, slot, H, row, v_smem, v_scale_smem, v_full, v_empty, n,
                STAGES,
            )  # fmt: skip
            slot = next_slot
            row = next_row
            n += 1
        _fetch(
            v_desc, [b, (slot * H + h) * _D, row], v_scales, slot, H, row, v_smem, v_scale_smem, v_full, v_empty, n,
            STAGES,
        )  # fmt: skip
        n += 1


@gluon.jit
def _scale_of(scale_smem, stage):
    return gl.sum(scale_smem.index(stage).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)


@gluon.jit
def _operand(p, O: gl.constexpr):  # noqa: E741
    """P as the 8-bit operand of P V: keys in the order in which V has them, which moves nothing between registers."""
    ROWS: gl.constexpr = p.shape[0]
    KEYS: gl.constexpr = p.shape[1]
    p = p.reshape([ROWS, KEYS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, KEYS])
    return gl.convert_layout(p, gl.DotOperandLayout(0, O, 4), assert_trivial=True).to(gl.float8e4nv)


@gluon.jit
def _keys_of(k_smem, stage):
    """A tile of K as the second operand of Q K^T."""
    return k_smem.index(stage).reshape([_N, _D]).permute((1, 0))


@gluon.jit
def _values_of(v_smem, stage):
    """A tile of V as the second operand of P V."""
    return v_smem.index(stage).reshape([_D, _N]).permute((1, 0))


@gluon.jit
def _without_columns_from(stop, x):
    """x, -inf from column ``stop`` on. Of column 8 g + 2 t + e a thread has one t, and g and e are constants of its
    registers; whole column numbers would be 30 registers that the compiler keeps through all loops.
    """
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    parts = x.reshape([ROWS, COLUMNS // 8, 4, 2])
    L: gl.constexpr = parts.type.layout
    g = gl.arange(0, COLUMNS // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))
    e = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))
    inside = (8 * g)[None, :, None, None] + e[None, None, None, :] < (stop - 2 * t)[None, None, :, None]
    parts = gl.where(inside, parts, float("-inf"))
    return gl.convert_layout(parts.reshape([ROWS, COLUMNS]), x.type.layout, assert_trivial=True)


@gluon.jit
def _masked_block(
    acc, m_i, l_i, q, q_scale, k_smem, v_smem, k_scale_smem, v_scale_smem, k_full, k_empty, v_full, v_empty, n,
    block_ptr, limits_ptr, sink_end, WG: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """acc, m_i and l_i after a block of up to KEYS keys, of which some are hidden or beyond the slot's end."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 32])
    O: gl.constexpr = acc.type.layout  # noqa: E741
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    stage = n % STAGES
    phase = _phase(n, STAGES)
    start = gl.load(block_ptr)
    stop = gl.load(block_ptr + 1)
    frame = gl.load(block_ptr + 2)
    partial = gl.load(block_ptr + 3) != 0
    rows = WG * _R + gl.arange(0, _R, layout=S_ROWS)
    end = gl.load(limits_ptr + rows, mask=partial, other=0)
    low = gl.load(limits_ptr + _T + rows, mask=partial, other=0)
    sees = (frame < end) & ((frame >= low) | (frame < sink_end)) | (not partial)
    m_old = gl.convert_layout(m_i, S_ROWS)
    l_old = gl.convert_layout(l_i, S_ROWS)
    mbarrier.wait(k_full.index(stage), phase)
    factor = gl.convert_layout(q_scale, S_ROWS) * _scale_of(k_scale_smem, stage)
    keys = k_smem.index(stage).reshape([_N, _D]).slice(0, KEYS, dim=0).permute((1, 0))
    zeros = gl.full([_R, KEYS], 0.0, gl.float32, S)
    scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    scores = gl.where(sees[:, None], scores * factor[:, None], float("-inf"))
    scores = _without_columns_from(stop - start, scores)
    m_new = gl.maximum(m_old, row_max(scores, S_ROWS) - _SHIFT)
    base = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = exp2(scores - base[:, None])
    alpha = exp2(m_old - base)
    l_new = l_old * alpha + row_sum(p, S_ROWS)
    mbarrier.wait(v_full.index(stage), phase)
    v_scale = _scale_of(v_scale_smem, stage)
    values = v_smem.index(stage).reshape([_D, _N]).slice(0, KEYS, dim=1).permute((1, 0))
    product = warpgroup_mma(_operand(p, O), values, gl.full([_R, _D], 0.0, gl.float32, O), use_acc=False, is_async=True)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
    product = warpgroup_mma_wait(0, deps=(product,))
    mbarrier.arrive(v_empty.index(stage), count=1)
    return acc + product * v_scale, gl.convert_layout(m_new, m_i.type.layout), gl.convert_layout(l_new, l_i.type.layout)


@gluon.jit
def _soften(scores, factor, m_i, l_i, POLYNOMIAL: gl.constexpr):
    """One online-softmax step of a block that every query sees whole; returns P, alpha, m_i, l_i."""
    ROWS: gl.constexpr = m_i.type.layout
    m_new = gl.maximum(m_i, row_max(scores, ROWS) * factor - _SHIFT)
    alpha = exp2(m_i - m_new)
    scores = scores * factor[:, None] - m_new[:, None]
    if POLYNOMIAL:
        p = exp2_partly_by_polynomial(scores)
    else:
        p = exp2(scores)
    return p, alpha, m_new, l_i * alpha + row_sum(p, ROWS)


@gluon.jit
def _consumer(
    out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, q_scales_ptr, q_smem, k_smem, v_smem, k_scale_smem,
    v_scale_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, segments_ptr, segment_counts_ptr, blocks_ptr,
    limits_ptr, most_segments, most_blocks, q_tiles, H, q_tokens, sink_end, qk_scale, WG: gl.constexpr,
    STAGES: gl.constexpr, NARROW: gl.constexpr, POLYNOMIAL: gl.constexpr
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _N, 32])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _D, 32])  # noqa: E741
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O)
    cta = gl.program_id(0)
    q = q_smem.index(WG).reshape([_R, _D])
    zeros = gl.full([_R, _N], 0.0, gl.float32, S)
    no_product = gl.full([_R, _D], 0.0, gl.float32, O)
    s_rows = WG * _R + gl.arange(0, _R, layout=S_ROWS)
    n = gl.to_tensor(0)  # blocks handled
    for s in range(gl.load(segment_counts_ptr + cta)):
        segment_ptr = segments_ptr + (cta * most_segments + s) * _SEGMENT_FIELDS
        tile = gl.load(segment_ptr)
        lo = gl.load(segment_ptr + 1)
        hi = gl.load(segment_ptr + 2)
        place = gl.load(segment_ptr + 3)
        masked = gl.load(segment_ptr + 4)
        bh = tile // q_tiles
        b = bh // H
        h = bh - b * H
        row = (tile - bh * q_tiles) * _T
        item_tile = b * q_tiles + tile - bh * q_tiles
        block_ptr = blocks_ptr + (item_tile.to(gl.int64) * most_blocks + lo) * _BLOCK_FIELDS
        row_limits = limits_ptr + item_tile.to(gl.int64) * 2 * _T
        inside = row + s_rows < q_tokens
        q_scale = gl.load(q_scales_ptr + (b * q_tokens + row + s_rows).to(gl.int64) * H + h, mask=inside, other=0.0)
        q_scale *= qk_scale
        m_i = gl.full([_R], float("-inf"), gl.float32, S_ROWS)  # the maximum to base 2, less _SHIFT
        l_i = gl.full([_R], 0.0, gl.float32, S_ROWS)
        acc = gl.full([_R, _D], 0.0, gl.float32, O)
        mbarrier.wait(q_full.index(WG), s & 1)
        first = gl.maximum(gl.minimum(masked, hi) - lo, 0)
        for _ in range(first):  # one after the other
            if gl.load(block_ptr + 1) - gl.load(block_ptr) <= NARROW:
                acc, m_i, l_i = _masked_block(
                    acc, m_i, l_i, q, q_scale, k_smem, v_smem, k_scale_smem, v_scale_smem, k_full, k_empty, v_full,
                    v_empty, n, block_ptr, row_limits, sink_end, WG, _TAIL, STAGES,
                )  # fmt: skip
            else:
                acc, m_i, l_i = _masked_block(
                    acc, m_i, l_i, q, q_scale, k_smem, v_smem, k_scale_smem, v_scale_smem, k_full, k_empty, v_full,
                    v_empty, n, block_ptr, row_limits, sink_end, WG, _N, STAGES,
                )  # fmt: skip
            block_ptr += _BLOCK_FIELDS
            n += 1
        unmasked = hi - lo - first
        if unmasked > 0:
            mbarrier.wait(k_full.index(n % STAGES), _phase(n, STAGES))
            factor = q_scale * _scale_of(k_scale_smem, n % STAGES)
            scores = warpgroup_mma(q, _keys_of(k_smem, n % STAGES), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(n % STAGES), count=1)
            p, alpha, m_i, l_i = _soften(scores, factor, m_i, l_i, POLYNOMIAL)
            acc = acc * gl.convert_layout(alpha, O_ROWS)[:, None]
            p8 = _operand(p, O)
            mbarrier.wait(k_full.index((n + 1) % STAGES), _phase(n + 1, STAGES), pred=unmasked > 1)
            last = n + unmasked - 1
            for j in range(n, last):
                # K of this block is there. Q K goes first, then P V of the block before; the softmax runs beside.
                k_stage = (j + 1) % STAGES
                v_stage = j % STAGES
                factor = q_scale * _scale_of(k_scale_smem, k_stage)
                scores = warpgroup_mma(q, _keys_of(k_smem, k_stage), zeros, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(v_stage), _phase(j, STAGES))
                v_scale = _scale_of(v_scale_smem, v_stage)
                product = warpgroup_mma(p8, _values_of(v_smem, v_stage), no_product, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores,))
                mbarrier.arrive(k_empty.index(k_stage), count=1)
                p, alpha, m_i, l_i = _soften(scores, factor, m_i, l_i, POLYNOMIAL)
                # A border that ptxas does not move the wait for P V across: without it no softmax runs beside.
                mbarrier.wait(k_full.index((j + 2) % STAGES), _phase(j + 2, STAGES), pred=j + 1 < last)
                product = warpgroup_mma_wait(0, deps=(product,))
                mbarrier.arrive(v_empty.index(v_stage), count=1)
                acc = rescaled(acc + product * v_scale, gl.convert_layout(alpha, O_ROWS))
                p8 = _operand(p, O)
            n = last
            mbarrier.wait(v_full.index(n % STAGES), _phase(n, STAGES))
            v_scale = _scale_of(v_scale_smem, n % STAGES)
            product = warpgroup_mma(p8, _values_of(v_smem, n % STAGES), no_product, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(v_empty.index(n % STAGES), count=1)
            acc = acc + product * v_scale
            n += 1
        mbarrier.arrive(q_empty.index(WG), count=1)

        visible = l_i > 0
        safe = gl.where(visible, l_i, 1.0)
        acc = acc * gl.convert_layout(1.0 / safe, O_ROWS)[:, None]
        lse = gl.where(visible, m_i + gl.log2(safe), float("-inf"))
        dims = gl.arange(0, _D, layout=gl.SliceLayout(0, O))
        o_rows = WG * _R + gl.arange(0, _R, layout=O_ROWS)
        # addresses depend on the segment: those that did not would be held in registers through the loop
        if place < 0:
            out_rows = out_ptr + b.to(gl.int64) * q_tokens * H * _D
            offsets = ((row + o_rows) * H + h)[:, None] * _D + dims[None, :]
            gl.store(out_rows + offsets, acc.to(out_ptr.dtype.element_ty), mask=(row + o_rows < q_tokens)[:, None])
            gl.store(lse_ptr + bh.to(gl.int64) * q_tokens + (row + s_rows), lse * _LN2, mask=inside)
        else:
            gl.store(partial_out_ptr + (place * _T + o_rows)[:, None] * _D + dims[None, :], acc)
            gl.store(partial_lse_ptr + (place * _T + s_rows), lse)


@gluon.jit(
    do_not_specialize=[
        "most_segments",
        "most_blocks",
        "q_tiles",
        "H",
        "q_tokens",
        "slot_stride",
        "slot_tokens",
        "stride_ks",
        "stride_vs",
        "sink_end",
    ]
)
def _attention_fp8_hopper_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, q_scales_ptr, k_scales_ptr,
    v_scales_ptr, segments_ptr, segment_counts_ptr, blocks_ptr, limits_ptr, most_segments, most_blocks, q_tiles, H,
    q_tokens, slot_stride, slot_tokens, stride_ks, stride_vs, sink_end, qk_scale, STAGES: gl.constexpr,
    NARROW: gl.constexpr, POLYNOMIAL: gl.constexpr
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(gl.float8e4nv, [2, 1, _R, _D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, _N, _D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, _D, _N], v_desc.layout)
    k_scale_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1], mbarrier.MBarrierLayout())
    v_scale_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (
                out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, q_scales_ptr, q_smem, k_smem, v_smem, k_scale_smem,
                v_scale_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, segments_ptr, segment_counts_ptr,
                blocks_ptr, limits_ptr, most_segments, most_blocks, q_tiles, H, q_tokens, sink_end, qk_scale, 0,
                STAGES, NARROW, POLYNOMIAL
            )),
            (_consumer, (
                out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, q_scales_ptr, q_smem, k_smem, v_smem, k_scale_smem,
                v_scale_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, segments_ptr, segment_counts_ptr,
                blocks_ptr, limits_ptr, most_segments, most_blocks, q_tiles, H, q_tokens, sink_end, qk_scale, 1,
                STAGES, NARROW, POLYNOMIAL
            )),
            (_producer, (
                q_desc, k_desc, v_desc, k_scales_ptr, v_scales_ptr, q_smem, k_smem, v_smem, k_scale_smem, v_scale_smem,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, segments_ptr, segment_counts_ptr, blocks_ptr,
                most_segments, most_blocks, q_tiles, H, slot_stride, slot_tokens, stride_ks, stride_vs, STAGES
            ))
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


PRODUCTION = {"STAGES": 2, "NARROW": 32, "POLYNOMIAL": False}
VARIANTS: dict[str, dict[str, int | bool]] = {
    "": {},
    "3 stages": {"STAGES": 3},
    "wide tails": {"NARROW": -1},
    "polynomial": {"POLYNOMIAL": True},
    "polynomial 3 stages": {"STAGES": 3, "POLYNOMIAL": True},
}
"""Beside the one in use, what waits to be measured (``bench/ops``): more stages, slots' ends as wide as other blocks,
a quarter of the exponentials on the FMA pipe."""


def launch(call: Float8Inputs, schedule: AttentionSchedule, variant: str = "") -> tuple[Tensor, Tensor]:
    """attention_fp8 over the key blocks of a schedule; what :func:`gluon.unfit` has nothing to say about.

    Returns:
        out [B, Tq, H, 128] contiguous, ``call.result``; natural logsumexp [B, H, Tq] float32.
    """
    q, k, v, scale = call.q, call.k, call.v, call.softmax_scale
    assert call.q_scales is not None
    schedule.require_fits(q, k, one_slot=True)
    if scale < 0:  # the kernel takes the maximum before it scales
        q, scale = (q.view(torch.uint8) ^ 0x80).view(q.dtype), -scale
    outputs = schedule.outputs(HEAD_DIM, call.result)
    tokens, (b, slots, h, d, width) = schedule.frame_tokens, v.shape
    values = descriptor(v, [b, slots * h * d, width], [steps(v)[0], width, 1], HEAD_DIM)
    with torch.cuda.device_of(q):
        _attention_fp8_hopper_kernel[(schedule.ctas,)](
            by_token(q, _ROWS), by_slot(k, tokens, BLOCK_KEYS), values, *outputs, call.q_scales.contiguous(),
            call.k_scales, call.v_scales, *schedule.tables, slot_stride(k, tokens), tokens, call.k_scales.stride(0),
            call.v_scales.stride(0), schedule.sink_end, scale * _LOG2E, **{**PRODUCTION, **VARIANTS[variant]},
            num_warps=4, maxnreg=LAUNCH_REGISTERS, **FUSED,
        )  # fmt: skip
        merge_cuts(schedule, *outputs)
    return outputs[:2]


def compile_cases(arch: int) -> list[Case]:
    """Hopper (sm_90) only."""
    if arch != 90:
        return []
    names = ("lse_ptr", "partial_out_ptr", "partial_lse_ptr", "q_scales_ptr", "k_scales_ptr", "v_scales_ptr")
    types = dict.fromkeys(names, "*fp32") | {"out_ptr": "*bf16", "qk_scale": "fp32"}
    for name, rows in (("q_desc", _ROWS), ("k_desc", BLOCK_KEYS), ("v_desc", HEAD_DIM)):
        types[name] = descriptor_type("fp8e4nv", rows)
    options = {"tensor_cores": True, "max_registers": LAUNCH_REGISTERS}
    return [
        Case.of(
            f"ring of 21 frames{variant and f', {variant}'}", _attention_fp8_hopper_kernel, types,
            {**PRODUCTION, **changes}, (), **options,
        )
        for variant, changes in VARIANTS.items()
    ]  # fmt: skip
