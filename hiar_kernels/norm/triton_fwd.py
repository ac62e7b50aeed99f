# mypy: allow-incomplete-defs
"""The norm family in Triton: forward. One kernel serves the norms, what an op leaves out is compiled out; the gated
residual alone reduces nothing, so it has a kernel of its own with smaller tiles.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.float8 import ROW_DTYPES
from ..common.shapes import CHANNELS
from ..common.torch_library import frames_of
from ..common.triton_float8 import HARDWARE_FROM, empty_rows, quantize_tile, stored_type
from ..common.triton_loader import FUSED, architecture, register
from .inputs import ARGUMENTS, OPTIONAL_GATE, QUANTIZED, NormInputs, names_of
from .tiles import (
    frame_strides,
    frame_vectors,
    norm_tile,
    normalise,
    plain_tile,
    production_case,
    tile_of_program,
    token_strides,
    unit_stride,
)


@triton.jit
def _norm_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, h_ptr, out_ptr, row_scale_ptr, F, tokens, tiles,
    stride_xb, stride_xt, stride_yb, stride_yt, stride_gateb, stride_gatef,
    stride_shiftb, stride_shiftf, stride_scaleb, stride_scalef, eps,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PER_FRAME: tl.constexpr, RMS: tl.constexpr,
    HARDWARE: tl.constexpr, INT8: tl.constexpr
):  # fmt: skip
    b, f, tile = tile_of_program(F, tiles)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    rows = f * tokens + t
    mask = (t < tokens)[:, None] & inside[None, :]
    out_at = (b * F * tokens + rows)[:, None] * C + cols[None, :]
    h = tl.load(x_ptr + b * stride_xb + rows[:, None] * stride_xt + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y_at = y_ptr + b * stride_yb + rows[:, None] * stride_yt + cols[None, :]
        y = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + b * stride_gateb + f * stride_gatef + cols, mask=inside, other=0.0).to(tl.float32)
            y = gate[None, :] * y
        rounded = (h + y).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + out_at, rounded, mask=mask)
        h = rounded.to(tl.float32)  # the norm is that of what was stored: fused or not, the same numbers
    scale = tl.load(scale_ptr + b * stride_scaleb + f * stride_scalef + cols, mask=inside, other=0.0).to(tl.float32)
    xhat, _ = normalise(h, mask, eps, C, RMS)
    out = xhat * ((1 + scale) if PER_FRAME else scale)[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + b * stride_shiftb + f * stride_shiftf + cols, mask=inside, other=0.0).to(tl.float32)
        out += shift[None, :]
    if row_scale_ptr is None:
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        values, row_scale = quantize_tile(tl.where(mask, out, 0.0), HARDWARE, INT8)
        tl.store(out_ptr + out_at, values, mask=mask)
        tl.store(row_scale_ptr + b * F * tokens + rows, row_scale, mask=t < tokens)


@triton.jit
def _gated_residual_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr, F, tokens, tiles,
    stride_xb, stride_xt, stride_yb, stride_yt, stride_gateb, stride_gatef,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    b, f, tile = tile_of_program(F, tiles)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = f * tokens + t
    mask = (t < tokens)[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + b * stride_xb + rows[:, None] * stride_xt + cols[None, :], mask=mask).to(tl.float32)
    y = tl.load(y_ptr + b * stride_yb + rows[:, None] * stride_yt + cols[None, :], mask=mask).to(tl.float32)
    gate = tl.load(gate_ptr + b * stride_gateb + f * stride_gatef + cols, mask=cols < C).to(tl.float32)
    out = (x + gate[None, :] * y).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (b * F * tokens + rows)[:, None] * C + cols[None, :], out, mask=mask)


def _tile(channels: int, per_frame: bool, residual: bool) -> dict[str, int]:
    # with a residual two rows of 1536 to a program: 17.3 us for 17.5 with four, 18.5 to 24 with others (H200)
    return norm_tile(channels, 4096 if residual else 8192, 16 if per_frame and not residual else 8)


def launch(op: str, *arguments: Tensor | float | None) -> Tensor | tuple[Tensor, ...]:
    """hiar::<op>."""
    inputs = NormInputs.from_schema(op, *arguments)
    x, y = unit_stride(inputs.x), None if inputs.y is None else unit_stride(inputs.y)
    batch, _, channels = x.shape
    frames, tokens = inputs.frames, frames_of(x, inputs.frames, op)
    hardware, row_scale = inputs.dtype is not None and architecture(x) >= HARDWARE_FROM, None
    if inputs.dtype is not None:
        out, stored, row_scale = empty_rows(x, inputs.dtype, hardware)
    else:
        out = stored = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gate, shift, scale = frame_vectors(inputs)
    with torch.cuda.device_of(x):
        if inputs.eps is None:
            tile = plain_tile(channels)
            tiles = triton.cdiv(tokens, tile["BLOCK_T"])
            _gated_residual_fwd_kernel[(batch * frames * tiles, triton.cdiv(channels, tile["BLOCK_C"]))](
                x, y, gate, out, frames, tokens, tiles, C=channels, **tile, **token_strides("x", x),
                **token_strides("y", y), **frame_strides("gate", gate), **FUSED,
            )  # fmt: skip
            return out
        h = None if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        per_frame = inputs.scale is not None
        tile = _tile(channels, per_frame, y is not None)
        tiles = triton.cdiv(tokens, tile["BLOCK_T"])
        _norm_fwd_kernel[(batch * frames * tiles,)](
            x, y, gate, shift, scale, h, stored, row_scale, frames, tokens, tiles, eps=inputs.eps, C=channels,
            PER_FRAME=per_frame, RMS=inputs.rms, HARDWARE=hardware, INT8=inputs.dtype == torch.int8, **tile,
            **token_strides("x", x), **token_strides("y", y), **frame_strides("gate", gate),
            **frame_strides("shift", shift), **frame_strides("scale", scale), **FUSED,
        )  # fmt: skip
    results = tuple(t for t in (h, out, row_scale) if t is not None)
    return results[0] if len(results) == 1 else results


for _op in (*ARGUMENTS, *QUANTIZED):
    register(_op, partial(launch, _op))


def _cases(op: str, arch: int, gated: bool = True, dtype: torch.dtype | None = None) -> list[Case]:
    int8 = dtype == torch.int8
    names, label = names_of(op), f"{op}{'' if gated else ' without a gate'}{' to int8' if int8 else ''}, "
    if op == "gated_residual":
        return [
            production_case(label, _gated_residual_fwd_kernel, c, "x y out", "gate", plain_tile(c)) for c in CHANNELS
        ]
    per_frame, residual, rms = "scale" in names, "y" in names, "bias" not in names and "weight" in names
    vectors = "scale" if rms else "shift scale"
    narrow = "x out" + (" y h" if residual else "") + ("" if per_frame else f" {vectors}")
    wide = ("gate " if "gate" in names and gated else "") + (vectors if per_frame else "")
    hardware, types = False, {}
    if dtype is not None:
        hardware = arch >= HARDWARE_FROM
        types, narrow = {"out": stored_type(dtype, arch)}, narrow.replace(" out", "")
        wide += " row_scale"
    return [
        production_case(
            label, _norm_fwd_kernel, c, narrow, wide, _tile(c, per_frame, residual), eight_bits=types,
            PER_FRAME=per_frame, RMS=rms, HARDWARE=hardware, INT8=int8,
        )
        for c in CHANNELS
    ]  # fmt: skip


def compile_cases(arch: int) -> list[Case]:
    """Every op in bfloat16, what belongs to frames in float32; the same tiles serve every architecture."""
    full = [case for op in ARGUMENTS for case in _cases(op, arch)] + _cases(OPTIONAL_GATE, arch, gated=False)
    for dtype in ROW_DTYPES:
        full += [case for op in QUANTIZED for case in _cases(op, arch, dtype=dtype)]
        full += _cases(f"{OPTIONAL_GATE}_quantized", arch, gated=False, dtype=dtype)
    return full
