# mypy: allow-incomplete-defs
"""rms_silu_pad in Triton: forward (gradients are the reference's)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.triton_loader import FUSED, register
from .layout import CACHE_FRAMES, format_of

_LAST = torch.channels_last_3d


def tile_of(channels: int, last: bool) -> dict[str, int]:
    """BLOCK_C x BLOCK_P: all channels of as many pixels as fit, 64 numbers a thread.

    With the channels last a pixel's stand together, and small tiles let more programs share an SM; else the more pixels
    stand together, the fewer are the pieces in which memory is read.
    """
    width = max(16, triton.next_power_of_2(channels))
    pixels = max(16, min(128, (8192 if last else 16384) // width))
    return {"BLOCK_C": width, "BLOCK_P": pixels, "num_warps": max(4, min(16, width * pixels // 2048))}


@triton.jit
def _inside(c, p, step, LAST: tl.constexpr):
    """Where channel c of pixel p stands within a frame; one of the two is dense, the other ``step`` apart."""
    return p * step + c if LAST else c * step + p


@triton.jit
def _dense(b, t, frames, c, p, n, C: tl.constexpr, LAST: tl.constexpr):
    """Where channel c of pixel p of frame t stands in a dense tensor of ``frames`` frames of n pixels."""
    first = b * frames * n * C
    return first + (t * n * C + _inside(c, p, C, LAST) if LAST else t * n + _inside(c, p, frames * n, LAST))


@triton.jit
def _rms_silu_pad_fwd_kernel(
    x_ptr, weight_ptr, cache_ptr, out_ptr, after_ptr, F, n, tiles, cached_frames,
    stride_xb, stride_xf, step_x, stride_cacheb, stride_cachef, step_cache, eps,
    C: tl.constexpr, PAST: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """One program: all channels of BLOCK_P pixels of one frame of the result; ``cached_frames``: of the cache."""
    pid = tl.program_id(0)
    frame = pid // tiles
    b, t = (frame // (F + PAST)).to(tl.int64), (frame % (F + PAST)).to(tl.int64)
    channels = tl.arange(0, BLOCK_C).to(tl.int64)  # 64 bits: a step times a channel may not fit 32
    pixels = (pid % tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    AXIS: tl.constexpr = 1 if LAST else 0
    c, p = tl.expand_dims(channels, 1 - AXIS), tl.expand_dims(pixels, AXIS)
    mask = (c < C) & (p < n)
    if t < PAST:
        y = tl.zeros(mask.shape, tl.float32)
        if cache_ptr is not None:
            at = t - PAST + cached_frames  # zeros before the cached frames
            from_cache = cache_ptr + b * stride_cacheb + at * stride_cachef + _inside(c, p, step_cache, LAST)
            y = tl.load(from_cache, mask=mask & (at >= 0), other=0.0).to(tl.float32)
    else:
        from_x = x_ptr + b * stride_xb + (t - PAST) * stride_xf + _inside(c, p, step_x, LAST)
        x = tl.load(from_x, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(x * x, AXIS))
        norm = tl.maximum(norm, eps, propagate_nan=tl.PropagateNan.ALL)  # by default GPUs would take eps for NaN
        y = x * tl.expand_dims(tl.sqrt(C * 1.0) / norm, AXIS) * tl.expand_dims(weight, 1 - AXIS)
        y = y / (1 + tl.exp(-y))
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + _dense(b, t, F + PAST, c, p, n, C, LAST), y, mask=mask)
    if t >= F:
        tl.store(after_ptr + _dense(b, t - F, PAST, c, p, n, C, LAST), y, mask=mask)


def _readable(x: Tensor, memory: torch.memory_format) -> Tensor:
    """x itself if its pixels follow each other at one step (B and F may lie anywhere), else a dense copy."""
    width = x.shape[4]
    inner = (1, x.stride(4)) if memory == _LAST else (x.stride(1), 1)
    ok = (x.stride(1), x.stride(4)) == inner and (x.shape[3] == 1 or x.stride(3) == width * x.stride(4))
    return x if ok else x.contiguous(memory_format=memory)


def _strides(name: str, x: Tensor | None, memory: torch.memory_format) -> dict[str, int]:
    if x is None:
        return {f"stride_{name}b": 0, f"stride_{name}f": 0, f"step_{name}": 0}
    step = x.stride(4) if memory == _LAST else x.stride(1)
    return {f"stride_{name}b": x.stride(0), f"stride_{name}f": x.stride(2), f"step_{name}": step}


def launch(x: Tensor, weight: Tensor, cache: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """hiar::rms_silu_pad."""
    memory = format_of(x)
    batch, channels, frames, height, width = x.shape
    out, after = (
        torch.empty((batch, channels, f, height, width), dtype=x.dtype, device=x.device, memory_format=memory)
        for f in (frames + CACHE_FRAMES, CACHE_FRAMES)
    )
    x, weight = _readable(x, memory), weight.contiguous()
    cache = None if cache is None else _readable(cache, memory)
    tile, pixels = tile_of(channels, memory == _LAST), height * width
    tiles = triton.cdiv(pixels, tile["BLOCK_P"])
    if x.numel():
        with torch.cuda.device_of(x):
            _rms_silu_pad_fwd_kernel[(batch * (frames + CACHE_FRAMES) * tiles,)](
                x, weight, cache, out, after, frames, pixels, tiles, 0 if cache is None else cache.shape[2], eps=eps,
                C=channels, PAST=CACHE_FRAMES, LAST=memory == _LAST, **tile,
                **_strides("x", x, memory), **_strides("cache", cache, memory), **FUSED,
            )  # fmt: skip
    return out, after


register("rms_silu_pad", launch)


def compile_cases(arch: int) -> list[Case]:
    """Widths of a decoder in both memory formats; one configuration serves every architecture."""
    types = dict.fromkeys(("x_ptr", "weight_ptr", "cache_ptr", "out_ptr", "after_ptr"), "*bf16") | {"eps": "fp32"}
    cases = []
    for last in (False, True):
        for channels in (96, 192, 384):
            tile = tile_of(channels, last)
            warps, name = tile.pop("num_warps"), f"{channels} channels{', last' if last else ''}"
            values: dict[str, Any] = {"C": channels, "PAST": CACHE_FRAMES, "LAST": last, **tile}
            aligned = ("stride_", "step_", "n")
            cases.append(Case.of(name, _rms_silu_pad_fwd_kernel, types, values, aligned, num_warps=warps))
    return cases
