# mypy: allow-incomplete-defs
"""int8_linear in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.shapes import CHANNELS, FEED_FORWARD
from ..common.triton_loader import FUSED, INTERPRETED, architecture, register

GROUP = 8  # rows of tiles whose columns are walked together, so that both operands stay in the L2 cache


@triton.jit
def _int8_linear_kernel(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr, rows, outputs, stride_x,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    tile = tl.program_id(0)
    group = tile // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    m = ((group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Past the last row or output the first ones are read again; what comes of them is not stored.
    x_at = x_ptr + (m % rows)[:, None] * stride_x + k[None, :]
    weight_at = weight_ptr + (n % outputs).to(tl.int64)[None, :] * K + k[:, None]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for first in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_at + first)
            weight = tl.load(weight_at + first)
        else:
            x = tl.load(x_at + first, mask=(k < K - first)[None, :], other=0)
            weight = tl.load(weight_at + first, mask=(k < K - first)[:, None], other=0)
        product = tl.dot(x, weight, product, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + m, mask=m < rows, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + n, mask=n < outputs, other=0.0)
    bias = tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)
    y = product.to(tl.float32) * x_scale[:, None] * weight_scale[None, :] + bias[None, :]
    at = out_ptr + m[:, None] * outputs + n[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])


def tile_of(arch: int) -> dict[str, int]:
    """Not measured: the largest tile without spills whose three stages every chip's shared memory holds."""
    if arch == INTERPRETED:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}


def launch(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    """hiar::int8_linear."""
    channels, outputs = x.shape[-1], weight.shape[0]
    flat = x.reshape(-1, channels)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    out = torch.empty((*x.shape[:-1], outputs), dtype=bias.dtype, device=x.device)
    tile = tile_of(architecture(x))
    if out.numel():
        grid = (triton.cdiv(len(flat), tile["BLOCK_M"]) * triton.cdiv(outputs, tile["BLOCK_N"]),)
        with torch.cuda.device_of(x):
            _int8_linear_kernel[grid](
                flat, x_scales.reshape(-1).contiguous(), weight.contiguous(), weight_scales.contiguous(),
                bias.contiguous(), out, len(flat), outputs, flat.stride(0), K=channels, GROUP_M=GROUP, **tile, **FUSED,
            )  # fmt: skip
    return out


register("int8_linear", launch)


def compile_cases(arch: int) -> list[Case]:
    """The linear layers of both model sizes."""
    tile = tile_of(arch)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    types = {"x_ptr": "*i8", "weight_ptr": "*i8", "x_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32"}
    types |= {"bias_ptr": "*bf16", "out_ptr": "*bf16"}
    return [
        Case.of(
            f"from {k} channels", _int8_linear_kernel, types, {"K": k, "GROUP_M": GROUP, **tile},
            ("stride_", "outputs"), num_warps=warps, num_stages=stages, tensor_cores=True,
        )
        for width in CHANNELS
        for k in (width, FEED_FORWARD[width])
    ]  # fmt: skip
