# mypy: allow-incomplete-defs
"""Rows in 8 bits, for Triton kernels: the arithmetic of :func:`.float8.quantize_last`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HARDWARE_FROM = 89  # the first architecture that converts to e4m3


@triton.jit
def e4m3_bits(y):
    """float32 within +-448, or NaN -> the bits of e4m3, to the nearest, ties to even.

    For GPUs without the conversion, and for Triton's interpreter, whose own (3.7.1) loses the carry into the exponent.
    """
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 20 bits of the mantissa go; the exponent's bias falls from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 the format's steps are 2^-9: those of float32 at 2^14, which an addition rounds to.
    raised = magnitude.to(tl.float32, bitcast=True) + 16384.0
    small = raised.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def largest_in(y):
    """max |y| of each row of y [N, C], inf where a number is not finite."""
    magnitude = tl.abs(y)
    return tl.max(tl.where(magnitude < float("inf"), magnitude, float("inf")), 1)


@triton.jit
def scale_of(largest, FULL: tl.constexpr = 448.0):
    """The scale of numbers whose largest is this, inf or above 0; FULL: the largest of the format."""
    return tl.maximum(tl.div_rn(largest, FULL), 1.1754943508222875e-38)


@triton.jit
def quantize_by(y, scale, HARDWARE: tl.constexpr):
    """y / scale in e4m3 (its bits, if the hardware does not convert); NaN where the scale is inf."""
    values = tl.minimum(tl.maximum(tl.div_rn(y, scale), -448.0), 448.0)
    values = tl.where(scale < float("inf"), values, float("nan"))
    return values.to(tl.float8e4nv) if HARDWARE else e4m3_bits(values)


@triton.jit
def stored_scale(scale):
    """As it is stored: 1 beside NaN."""
    return tl.where(scale < float("inf"), scale, 1.0)


@triton.jit
def e4m3_numbers(bits):
    """The inverse of :func:`e4m3_bits`, exact in float16."""
    wide = bits.to(tl.uint16)
    # The exponent's bias is 7 here and 15 in float16.
    number = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), number).to(tl.float16)


@triton.jit
def round_to_e4m3(y):
    """float32 in 0..448, or NaN -> the nearest number of e4m3, ties to even."""
    bits = y.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    return tl.where(y < 0.015625, (y + 16384.0) - 16384.0, tl.where(y == y, normal, y))


@triton.jit
def quantize_tile(y, HARDWARE: tl.constexpr, INT8: tl.constexpr = False):
    """Rows y [N, C], zero where nothing stands -> their e4m3 (its bits, if the hardware does not convert) or int8, and
    scales [N].

    The caller's masked numbers are 0 and change nothing.
    """
    if INT8:
        scale = scale_of(largest_in(y), 127.0)
        values = tl.minimum(tl.maximum(tl.div_rn(y, scale[:, None]), -127.0), 127.0)
        values = (values + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest whole number, ties to even
        values = tl.where(scale[:, None] < float("inf"), values, 0.0).to(tl.int8)
        row_scale = tl.where(scale < float("inf"), scale, float("nan"))
    else:
        scale = scale_of(largest_in(y))
        values = quantize_by(y, scale[:, None], HARDWARE)
        row_scale = stored_scale(scale)
    return values, row_scale


def empty_rows(x: Tensor, dtype: torch.dtype, hardware: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For rows like x [..., C]: values in 8 bits, the same memory as the kernel stores it, and scales."""
    typed = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return typed, typed if hardware or dtype == torch.int8 else typed.view(torch.uint8), scales


def stored_type(dtype: torch.dtype, arch: int) -> str:
    """How a compiled kernel's pointer to such rows is typed."""
    if dtype == torch.int8:
        return "*i8"
    return "*fp8e4nv" if arch >= HARDWARE_FROM else "*u8"
