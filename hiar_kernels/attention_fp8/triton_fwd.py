# mypy: allow-incomplete-defs
"""attention_fp8 in Triton.

One program has a tile of queries of one head and goes from slot to slot, and through each in blocks of keys that never
leave it. Keys are loaded in the order in which values are stored, so that probabilities need not move.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import _launch
from ..attention._launch import Tile
from ..attention._visible import NONE, SEEN, frame_at, kind_of_keys, limits, query_ends, sees
from ..common.aot import Case
from ..common.shapes import HEAD_DIM
from ..common.triton_float8 import HARDWARE_FROM, e4m3_numbers, round_to_e4m3
from ..common.triton_loader import FUSED, architecture, register
from .inputs import P_SCALE, Float8Inputs

_SHIFT = tl.constexpr(math.log2(P_SCALE))

# By architecture (0: the interpreter), at head_dim 128: what compiles without spills in Triton 3.6.0 to 3.8.0. Not
# measured.
EIGHT_BITS = {
    0: Tile(16, 32, 4, 1),
    80: Tile(128, 32, 8, 2),
    90: Tile(128, 128, 8, 2),
    100: Tile(128, 32, 8, 2),
}
SIXTEEN_BITS = {
    0: Tile(16, 16, 4, 1),
    80: Tile(128, 32, 8, 2),
    89: Tile(64, 32, 8, 2),
    90: Tile(128, 32, 8, 2),
    120: Tile(64, 32, 8, 2),
}
FLOAT32 = {0: Tile(16, 16, 4, 1), 80: Tile(32, 32, 8, 1)}


@triton.jit(do_not_specialize=["q_tokens", "q_tiles", "rows", "slots", *_launch.RULE])
def _attention_fp8_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, q_scale_ptr, q_frames_ptr, kv_frames_ptr, windows_ptr, out_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ksb, stride_kss, stride_ksh, stride_vsb, stride_vss, stride_vsh, stride_qsb, stride_qst, stride_qsh,
    stride_qfb, stride_kfb, q_tokens, q_tiles, rows, slots, H, qk_scale,
    frame_tokens, frames_per_block, first_frame, origin, sink_frames, sink_end,
    WORK: tl.constexpr, HARDWARE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """WORK: the dtype of the products; q_scale_ptr None: q has it. HARDWARE: 8 bits are typed, else they are bytes."""
    pid = tl.program_id(0)
    tile = q_tiles - 1 - pid % q_tiles
    h = (pid // q_tiles % H).to(tl.int64)
    b = (pid // q_tiles // H).to(tl.int64)

    t = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_mask = t < q_tokens
    dims = tl.arange(0, HEAD_DIM)
    wide = t.to(tl.int64)
    q = tl.load(
        q_ptr + b * stride_qb + h * stride_qh + wide[:, None] * stride_qt + dims[None, :],
        mask=q_mask[:, None],
        other=0.0,
    )
    factor = tl.full([BLOCK_Q], 1.0, tl.float32) * qk_scale
    if q_scale_ptr is not None:
        factor *= tl.load(q_scale_ptr + b * stride_qsb + h * stride_qsh + wide * stride_qst, mask=q_mask, other=0.0)
        if not HARDWARE:
            q = e4m3_numbers(q)
    ends, least, greatest = query_ends(
        q_frames_ptr + b * stride_qfb, t, q_mask, first_frame, frame_tokens, origin, frames_per_block
    )
    before, back, sinks = limits(windows_ptr, b, frames_per_block, sink_frames, sink_end, SEEN)

    place = tl.arange(0, BLOCK_KV)  # of a value; of each 16, place 4 t + 2 i + e has key 8 i + 2 t + e
    key = place // 16 * 16 + (place >> 1) % 2 * 8 + (place >> 2) % 4 * 2 + place % 2
    k_offs = key[:, None] * stride_kt + dims[None, :]
    v_offs = dims[:, None] * stride_vd + place[None, :]
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    k_scale_ptr += b * stride_ksb + h * stride_ksh
    v_scale_ptr += b * stride_vsb + h * stride_vsh

    acc = tl.zeros([BLOCK_Q, HEAD_DIM], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_Q], dtype=tl.float32)
    m_i = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    for slot in range(0, slots):
        frame = frame_at(kv_frames_ptr + b * stride_kfb, slot, slot < slots, first_frame)
        kind = kind_of_keys(frame, ends, q_mask, least, greatest, before, back, sinks)
        length = tl.where(kind == NONE, 0, frame_tokens)
        at = tl.cast(slot, tl.int64)
        seen = sees(frame, ends, before, back, sinks)
        scale = factor * tl.load(k_scale_ptr + at * stride_kss)
        v_scale = tl.load(v_scale_ptr + at * stride_vss)
        k_slot, v_slot = k_ptr + at * frame_tokens * stride_kt, v_ptr + at * stride_vs
        for start in tl.range(0, length, BLOCK_KV):
            inside = start + key < length
            k = tl.load(k_slot + start * stride_kt + k_offs, mask=inside[:, None], other=0.0)
            v = tl.load(v_slot + start + v_offs, mask=inside[None, :], other=0.0)
            if not HARDWARE:
                k, v = e4m3_numbers(k), e4m3_numbers(v)
            k, v = k.to(WORK), v.to(WORK)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale[:, None]
            scores = tl.where(seen[:, None] & inside[None, :], scores, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(scores, 1))
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # no visible key so far
            if q_scale_ptr is None:
                p = tl.exp2(scores - finite[:, None])
            else:
                p = tl.exp2(scores - (finite - _SHIFT)[:, None])
            alpha = tl.exp2(m_i - finite)
            l_i = l_i * alpha + tl.sum(p, 1)
            if q_scale_ptr is not None and not HARDWARE:
                p = round_to_e4m3(p)
            summed = tl.dot(p.to(WORK), tl.trans(v), input_precision=PRECISION)
            acc = acc * alpha[:, None] + summed * v_scale
            m_i = m_new
    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # nothing visible
    out_offs = ((b * q_tokens + wide[:, None]) * H + h) * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_offs, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=q_mask[:, None])


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launch(*arguments: Any) -> Tensor:
    """hiar::attention_fp8."""
    call = Float8Inputs.from_schema(*arguments)
    q, mask, arch = call.q, call.mask, architecture(call.q)
    b, length, h, d = q.shape
    out = torch.empty(q.shape, dtype=call.result, device=q.device)
    slots = call.kv_frames.shape[1]
    if out.numel() == 0:
        return out
    hardware = arch >= HARDWARE_FROM
    if call.eight_bits:
        table, work = EIGHT_BITS, tl.float8e4nv if hardware else tl.float16
    else:
        table, work = (FLOAT32 if q.dtype == torch.float32 else SIXTEEN_BITS), _TYPES[q.dtype]
    tile = _launch.pick(table, arch)
    q8, k, v = arguments[:3]  # bytes, or typed where the hardware converts
    if hardware:
        q8, k, v = call.q, call.k, call.v
    q_frames, kv_frames = (_launch.dense_rows(x.to(torch.int32)) for x in (call.q_frames, call.kv_frames))
    tiles = triton.cdiv(length, tile.q)
    with torch.cuda.device_of(q):
        _attention_fp8_kernel[(tiles * b * h,)](
            q8, k, v, call.k_scales, call.v_scales, call.q_scales, q_frames, kv_frames,
            _launch.windows_on(q.device, mask, b), out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:4],
            *call.k_scales.stride(), *call.v_scales.stride(),
            *((0, 0, 0) if call.q_scales is None else call.q_scales.stride()),
            _launch.row_stride(q_frames), _launch.row_stride(kv_frames), length, tiles, b, slots, h,
            call.softmax_scale * math.log2(math.e), **_launch.rule_arguments(mask, 0), WORK=work, HARDWARE=hardware,
            HEAD_DIM=d, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **tile.options(), **FUSED,
        )  # fmt: skip
    return out


register("attention_fp8", launch)


def compile_cases(arch: int) -> list[Case]:
    """A block over a ring, both forms."""
    hardware = arch >= HARDWARE_FROM
    byte = "*fp8e4nv" if hardware else "*u8"
    cases = []
    for name, table, eight in (("8-bit products", EIGHT_BITS, True), ("bfloat16 products", SIXTEEN_BITS, False)):
        tile = _launch.pick(table, arch)
        types = {"q_ptr": byte if eight else "*bf16", "k_ptr": byte, "v_ptr": byte, "out_ptr": "*bf16"}
        types |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr", "q_scale_ptr"), "*fp32") | {"qk_scale": "fp32"}
        work = (tl.float8e4nv if hardware else tl.float16) if eight else tl.bfloat16
        fixed = {"WORK": work, "HARDWARE": hardware, "HEAD_DIM": HEAD_DIM, "PRECISION": "tf32", **tile.constexprs()}
        fixed |= {} if eight else {"q_scale_ptr": None}
        aligned = ("stride_qb", "stride_qt", "stride_qh", "stride_kb", "stride_kt", "stride_kh", "stride_v")
        case = Case.of(
            name, _attention_fp8_kernel, types, fixed, aligned, num_warps=tile.warps, num_stages=tile.stages,
            tensor_cores=True,
        )  # fmt: skip
        scales = ("stride_vsb", "stride_vss", "stride_vsh")
        cases.append(replace(case, divisible=tuple(x for x in case.divisible if x not in scales)))
    return cases
