# mypy: allow-incomplete-defs
"""attention in Triton: backward. Deterministic: one program sums each gradient in a fixed order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.triton_loader import FUSED, register
from . import _launch
from ._runs import dkdv_rest, dkdv_whole, dq_rest, dq_whole
from ._visible import (
    EARLIER,
    EVERY,
    FULL,
    NONE,
    OWN,
    PARTIAL,
    REST,
    SEEN,
    WHOLE,
    frame_at,
    key_bounds,
    key_run,
    key_source,
    limits,
    query_ends,
    query_run,
    source_frames,
    source_limits,
    unmasked_until,
)
from .inputs import AttentionInputs

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["q_tokens", "tiles"])
def _attention_bwd_delta_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, lse2_ptr, q_tokens, tiles, H,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, and the logsumexp to base 2; +inf where no key is visible, so that p is 0."""
    pid = tl.program_id(0)
    bh = (pid // tiles).to(tl.int64)
    t = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_mask = t < q_tokens
    offs = ((bh // H * q_tokens + t[:, None]) * H + bh % H) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    dout = tl.load(dout_ptr + offs, mask=q_mask[:, None], other=0.0).to(tl.float32)
    out = tl.load(out_ptr + offs, mask=q_mask[:, None], other=0.0).to(tl.float32)
    rows = bh * q_tokens + t
    lse = tl.load(lse_ptr + rows, mask=q_mask, other=float("-inf"))
    dlse = tl.load(dlse_ptr + rows, mask=q_mask, other=0.0)
    empty = lse == float("-inf")
    tl.store(delta_ptr + rows, tl.where(empty, 0.0, tl.sum(dout * out, 1) - dlse), mask=q_mask)
    tl.store(lse2_ptr + rows, tl.where(empty, float("inf"), lse * _LOG2E), mask=q_mask)


@triton.jit(do_not_specialize=["q_tokens", "kv_tokens", "context_tokens", "q_tiles", *_launch.RULE])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, context_k_ptr, context_v_ptr, q_frames_ptr, kv_frames_ptr, context_frames_ptr, windows_ptr,
    counts_ptr, dout_ptr, lse2_ptr, delta_ptr, dq_ptr, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_ckb, stride_ckt, stride_ckh, stride_cvb, stride_cvt, stride_cvh,
    stride_qfb, stride_kfb, stride_cfb, stride_nb, q_tokens, kv_tokens, context_tokens, q_tiles, H, qk_scale, dq_scale,
    frame_tokens, frames_per_block, first_frame, origin, sink_frames, sink_end,
    MASKED: tl.constexpr, CONTEXT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_MASKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Gradient of one tile of queries of one head and row."""
    pid = tl.program_id(0)
    tile = q_tiles - 1 - pid % q_tiles
    h = (pid // q_tiles % H).to(tl.int64)
    b = (pid // q_tiles // H).to(tl.int64)

    t = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_mask = t < q_tokens
    dims = tl.arange(0, HEAD_DIM)
    wide = t.to(tl.int64)[:, None]
    q_offs = b * stride_qb + h * stride_qh + wide * stride_qt + dims[None, :]
    q = tl.load(q_ptr + q_offs, mask=q_mask[:, None], other=0.0)
    dense = ((b * q_tokens + wide) * H + h) * HEAD_DIM + dims[None, :]
    dout = tl.load(dout_ptr + dense, mask=q_mask[:, None], other=0.0)
    rows = (b * H + h) * q_tokens + t
    lse2 = tl.load(lse2_ptr + rows, mask=q_mask, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=q_mask, other=0.0)

    acc = tl.zeros([BLOCK_Q, HEAD_DIM], dtype=tl.float32)
    if MASKED:
        if q_frames_ptr is not None:
            q_frames_ptr += b * stride_qfb
        ends, least, greatest = query_ends(q_frames_ptr, t, q_mask, first_frame, frame_tokens, origin, frames_per_block)
    else:
        ends, least, greatest = t, 0, 0
    if counts_ptr is not None:
        counts_ptr += b * stride_nb
    for phase in tl.static_range(WHOLE, REST + 1):
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
                mid = unmasked_until(lo, hi, kind, BLOCK_KV)
                if phase == WHOLE:
                    acc = dq_whole(
                        acc, q, dout, lse2, delta, lo, mid, run_k_ptr, run_v_ptr, run_kt, run_vt, qk_scale, HEAD_DIM,
                        BLOCK_KV, PRECISION,
                    )  # fmt: skip
                else:
                    acc = dq_rest(
                        acc, q, dout, lse2, delta, mid, hi, run_k_ptr, run_v_ptr, run_kt, run_vt, frames_ptr,
                        counts_ptr, first_frame, frame_tokens, ends, before, back, sinks, qk_scale, MASKED, HEAD_DIM,
                        BLOCK_MASKED, PRECISION,
                    )  # fmt: skip
                slot = stop
            tile += slot - slots  # 0, but unknown to the compiler: keeps the offsets below out of the loop's registers
    t = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_mask = t < q_tokens
    dense = ((b * q_tokens + t.to(tl.int64)[:, None]) * H + h) * HEAD_DIM + dims[None, :]
    tl.store(dq_ptr + dense, (acc * dq_scale).to(dq_ptr.dtype.element_ty), mask=q_mask[:, None])


@triton.jit(do_not_specialize=["q_tokens", "kv_tokens", "kv_tiles", *_launch.RULE])
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, q_frames_ptr, frames_ptr, windows_ptr, counts_ptr, dout_ptr, lse2_ptr, delta_ptr, dk_ptr,
    dv_ptr, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_qfb, stride_kfb, stride_nb, q_tokens, kv_tokens, kv_tiles, H, qk_scale, dk_scale,
    frame_tokens, frames_per_block, first_frame, origin, sink_frames, sink_end,
    KEYS: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_MASKED: tl.constexpr, PRECISION: tl.constexpr
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
        mid = q_tokens // BLOCK_Q * BLOCK_Q
        dk, dv = dkdv_whole(
            dk, dv, k, v, bias, 0, mid, q_ptr, dout_ptr, lse2_ptr, delta_ptr, stride_qt, stride_dt, qk_scale,
            counts_ptr is not None, NEED_DK, NEED_DV, HEAD_DIM, BLOCK_Q, PRECISION,
        )  # fmt: skip
        dk, dv = dkdv_rest(
            dk, dv, k, v, bias, mid, q_tokens, q_ptr, dout_ptr, lse2_ptr, delta_ptr, stride_qt, stride_dt, None,
            first_frame, frame_tokens, origin, frames_per_block, cols, 0, 0, 0, qk_scale, KEYS, counts_ptr is not None,
            NEED_DK, NEED_DV, HEAD_DIM, BLOCK_MASKED, PRECISION,
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
        for phase in tl.static_range(WHOLE, REST + 1):
            slot = 0
            while slot < slots:
                kind, stop = query_run(
                    slot, slots, q_frames_ptr, first_frame, origin, frames_per_block, frames, inside, lowest, first,
                    last, before, back, sinks,
                )  # fmt: skip
                lo = slot * frame_tokens
                hi = tl.where(kind == NONE, lo, stop * frame_tokens)
                mid = unmasked_until(lo, hi, kind, BLOCK_Q)
                if phase == WHOLE:
                    dk, dv = dkdv_whole(
                        dk, dv, k, v, bias, lo, mid, q_ptr, dout_ptr, lse2_ptr, delta_ptr, stride_qt, stride_dt,
                        qk_scale, False, NEED_DK, NEED_DV, HEAD_DIM, BLOCK_Q, PRECISION,
                    )  # fmt: skip
                else:
                    dk, dv = dkdv_rest(
                        dk, dv, k, v, bias, mid, hi, q_ptr, dout_ptr, lse2_ptr, delta_ptr, stride_qt, stride_dt,
                        q_frames_ptr, first_frame, frame_tokens, origin, frames_per_block, frames, before, back, sinks,
                        qk_scale, KEYS, False, NEED_DK, NEED_DV, HEAD_DIM, BLOCK_MASKED, PRECISION,
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
    *arguments: Any,
    dq_config: _launch.Tile | None = None,
    dkdv_config: _launch.Tile | None = None,
) -> list[Tensor]:
    """hiar::attention_backward: gradients of q, k, v and the context's k and v, as far as needed.

    ``dq_config`` and ``dkdv_config`` replace the pinned tiles, for benchmarks.
    """
    call = AttentionInputs.from_schema(*arguments)
    _launch.check(call)
    q, k, v, mask, context = call.q, call.k, call.v, call.mask, call.context
    b, length, h, d = q.shape
    context_k, context_v = (None, None) if context is None else context.kv
    differentiable = [x for x in (q, k, v, context_k, context_v) if x is not None]
    gradients: list[Tensor | None] = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip(differentiable, needed)
    ]
    gradients += [None] * (5 - len(gradients))
    dout, dlse = (g.contiguous() for g in grads)
    out, lse = (x.contiguous() for x in outputs)
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    scale, sign = call.softmax_scale, 1.0
    if scale < 0:  # as the forward did
        q, scale, sign = -q, -scale, -1.0
    ids, kv_counts = _launch.device_ids(call), _launch.dense_rows(call.kv_counts)
    shared: dict[str, Any] = {
        **_launch.strides("q", q),
        "stride_qfb": ids.strides["stride_qfb"],
        "stride_nb": _launch.row_stride(kv_counts),
        "q_tokens": length,
        "H": h,
        "qk_scale": scale * _LOG2E.value,
        "HEAD_DIM": d,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }

    def key_gradients(
        keys: Tensor, values: Tensor, dk: Tensor | None, dv: Tensor | None, frames: Tensor | None, kind: int
    ) -> None:
        if (dk is None and dv is None) or keys.numel() == 0:
            return
        tile = dkdv_config or _launch.tile_for(q, _launch.DKDV)
        tiles = triton.cdiv(keys.shape[1], tile.kv)
        _attention_bwd_dkdv_kernel[(tiles * b * h,)](
            q, keys, values, ids.q_frames, frames, ids.windows, kv_counts, dout, lse2, delta, dk, dv,
            **_launch.strides("k", keys), **_launch.strides("v", values), stride_kfb=_launch.row_stride(frames),
            kv_tokens=keys.shape[1], kv_tiles=tiles, dk_scale=scale, KEYS=kind, NEED_DK=dk is not None,
            NEED_DV=dv is not None, **_launch.rule_arguments(mask, length), **shared, **tile.options(), **FUSED,
        )  # fmt: skip

    with torch.cuda.device_of(q):
        if out.numel():
            tiles = triton.cdiv(length, 32)
            _attention_bwd_delta_kernel[(tiles * b * h,)](
                dout, out, lse, dlse, delta, lse2, length, tiles, h, HEAD_DIM=d, BLOCK_Q=32, num_warps=4, **FUSED,
            )  # fmt: skip
        dq, dk, dv, context_dk, context_dv = gradients
        if dq is not None and dq.numel():
            tile = dq_config or _launch.tile_for(q, _launch.DQ)
            tiles = triton.cdiv(length, tile.q)
            _attention_bwd_dq_kernel[(tiles * b * h,)](
                q, k, v, context_k, context_v, *ids.pointers, kv_counts, dout, lse2, delta, dq,
                **_launch.key_strides(call), **{**ids.strides, **shared}, kv_tokens=k.shape[1],
                context_tokens=0 if context_k is None else context_k.shape[1], q_tiles=tiles, dq_scale=sign * scale,
                MASKED=mask is not None, CONTEXT=context is not None, **_launch.rule_arguments(mask, k.shape[1]),
                **tile.options(), **FUSED,
            )  # fmt: skip
        own = EVERY if mask is None else SEEN if context is None else OWN
        key_gradients(k, v, dk, dv, ids.kv_frames, own.value)
        if context_k is not None and context_v is not None:
            key_gradients(context_k, context_v, context_dk, context_dv, ids.context_frames, EARLIER.value)
    return [x for x in gradients if x is not None]


register("attention_backward", launch)


def _dq_case(name: str, pointers: tuple[str, ...], tile: _launch.Tile) -> Case:
    constexprs = {"pointers": pointers, "MASKED": bool(pointers)}
    return _launch.production_case(name, _attention_bwd_dq_kernel, constexprs, tile)


def _dkdv_case(name: str, kind: Any, pointers: tuple[str, ...], tile: _launch.Tile) -> Case:
    constexprs = {"pointers": pointers, "KEYS": kind.value, "NEED_DK": True, "NEED_DV": True}
    # Spills on sm_90: 16 to 24 bytes with Triton 3.7, 32 with 3.6, which needs 18.78 ms block-causal (64x64: 29.96).
    spills_allowed = 32 if pointers and tile == _launch.DKDV[90] else 0
    case = _launch.production_case(name, _attention_bwd_dkdv_kernel, constexprs, tile)
    return replace(case, spills_allowed=spills_allowed)


_FRAMES = ("q_frames_ptr", "kv_frames_ptr", "frames_ptr", "windows_ptr")


def compile_cases(arch: int) -> list[Case]:
    """Training over caches, block-causal, bidirectional."""
    context = ("context_k_ptr", "context_v_ptr", "context_frames_ptr")
    dq, dkdv = _launch.pick(_launch.DQ, arch), _launch.pick(_launch.DKDV, arch)
    delta = _launch.production_case(
        "every shape", _attention_bwd_delta_kernel, {"pointers": ()}, _launch.Tile(32, 32, 4, 1), tensor_cores=False
    )
    return [
        delta,
        # on sm_90 8 bytes with Triton 3.6 and 3.8; measured with 3.6: 10.57 ms, without spills (128x64, 8 warps) 12.39
        replace(_dq_case("training over caches", (*_FRAMES, *context), dq), spills_allowed=8 if arch == 90 else 0),
        _dq_case("block-causal", _FRAMES, dq),
        _dq_case("bidirectional", (), dq),
        _dkdv_case("own keys beside caches", OWN, _FRAMES, dkdv),
        _dkdv_case("caches with gradients", EARLIER, _FRAMES, dkdv),
        _dkdv_case("block-causal", SEEN, _FRAMES, dkdv),
        _dkdv_case("bidirectional", EVERY, (), dkdv),
    ]


def candidate_cases(arch: int) -> list[tuple[_launch.Tile, Case]]:
    """The configurations to measure, at the shape of block-causal training (dq) and bidirectional training (dkdv)."""
    dq, dkdv = (_launch.CANDIDATES[kernel].get(arch, ()) for kernel in ("dq", "dkdv"))
    return [
        *((tile, _dq_case("candidate", _FRAMES, tile)) for tile in dq),
        *((tile, _dkdv_case("candidate", EVERY, (), tile)) for tile in dkdv),
    ]
