# mypy: allow-incomplete-defs
"""quantize_rows in Triton."""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.float8 import ROW_DTYPES
from ..common.shapes import CHANNELS, FEED_FORWARD
from ..common.triton_float8 import HARDWARE_FROM, empty_rows, quantize_tile, stored_type
from ..common.triton_loader import FUSED, architecture, register


@triton.jit
def _quantize_rows_kernel(
    x_ptr, values_ptr, scale_ptr, rows, stride_x, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    GELU: tl.constexpr, HARDWARE: tl.constexpr, INT8: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    mask = (r < rows)[:, None] & (cols < C)[None, :]
    y = tl.load(x_ptr + r[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)  # sqrt(2 / pi)
        y = y / (1 + tl.exp(-2 * inner))  # y (1 + tanh(inner)) / 2
    values, scale = quantize_tile(y, HARDWARE, INT8)
    tl.store(values_ptr + r[:, None] * C + cols[None, :], values, mask=mask)
    tl.store(scale_ptr + r, scale, mask=r < rows)


def tile_of(channels: int) -> dict[str, int]:
    """Whole rows, about 8192 numbers to a program."""
    width = max(16, triton.next_power_of_2(channels))
    rows = min(16, max(1, 4096 // width))
    return {"BLOCK_R": rows, "BLOCK_C": width, "num_warps": max(4, min(16, rows * width // 1024))}


def launch(x: Tensor, activation: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hiar::quantize_rows."""
    hardware = architecture(x) >= HARDWARE_FROM
    channels = x.shape[-1]
    flat = x.reshape(-1, channels)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    values, stored, scales = empty_rows(x, dtype, hardware)
    tile = tile_of(channels)
    if len(flat):
        with torch.cuda.device_of(x):
            _quantize_rows_kernel[(triton.cdiv(len(flat), tile["BLOCK_R"]),)](
                flat, stored, scales, len(flat), flat.stride(0), C=channels, GELU=activation is not None,
                HARDWARE=hardware, INT8=dtype == torch.int8, **tile, **FUSED,
            )  # fmt: skip
    return values, scales


register("quantize_rows", launch)


def compile_cases(arch: int) -> list[Case]:
    """Attention's output and the hidden layer of the feed-forward, of both model sizes."""
    cases = []
    for dtype, width in product(ROW_DTYPES, CHANNELS):
        types = {"x_ptr": "*bf16", "values_ptr": stored_type(dtype, arch), "scale_ptr": "*fp32"}
        for channels, gelu in ((width, False), (FEED_FORWARD[width], True)):
            tile = tile_of(channels)
            warps = tile.pop("num_warps")
            values = {
                "C": channels,
                "GELU": gelu,
                "HARDWARE": arch >= HARDWARE_FROM,
                "INT8": dtype == torch.int8,
                **tile,
            }
            name = f"{channels} channels{', GELU' if gelu else ''}{', int8' if dtype == torch.int8 else ''}"
            cases.append(Case.of(name, _quantize_rows_kernel, types, values, ("stride_",), num_warps=warps))
    return cases
