"""qk_norm_rope and qk_norm_rope_append, eager."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import wide_dtype


def rope_angles(
    frames: Tensor, height: int, width: int, head_dim: int, theta: float, cells: Sequence[int] | None = None
) -> Tensor:
    """Angles float64 [B, F * tokens, head_dim / 2] of 3D RoPE (Wan2.1; RoFormer, arXiv 2104.09864).

    The c = head_dim / 2 pairs are split c - 2 (c // 3), c // 3, c // 3 over (frame, row, column); each axis has the
    frequencies of its own even dimension. Absolute frame ids in float64: exact at frame 1,000,000 and beyond. Tokens
    are the cells [start, stop) of every frame, all height * width of them by default.
    """
    pairs = head_dim // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)

    def count(n: int) -> Tensor:
        return torch.arange(n, device=frames.device, dtype=torch.float64)

    positions = (frames.to(torch.float64), count(height), count(width))
    angles = [p[..., None] * theta ** (-count(n) / max(n, 1)) for p, n in zip(positions, split, strict=True)]
    b, f = frames.shape
    grid = (b, f, height, width)
    t = angles[0][:, :, None, None].expand(*grid, split[0])
    y = angles[1][None, None, :, None].expand(*grid, split[1])
    x = angles[2][None, None, None].expand(*grid, split[2])
    start, stop = cells or (0, height * width)
    return torch.cat([t, y, x], dim=-1).flatten(2, 3)[:, :, start:stop].flatten(1, 2)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Adjacent pairs of the last dimension as complex numbers, turned."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    b, t, c = qkv.shape
    q, k, v = qkv.view(b, t, 3, c // 3).unbind(2)
    return q, k, v.unflatten(-1, (heads, -1))


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    frames: Tensor,
    num_heads: int,
    height: int,
    width: int,
    eps: float,
    theta: float,
    cells: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Normed and rotated q, k [B, T, H, D]; float32 or wider inside, rounded once."""
    q, k, v = _split(qkv, num_heads)
    wide = wide_dtype(qkv)
    angles = rope_angles(frames, height, width, v.shape[-1], theta, cells)[:, :, None]
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    turned = [
        _rotate(_rms_norm(x.to(wide), w, eps).unflatten(-1, (num_heads, -1)), cos, sin).to(qkv.dtype)
        for x, w in ((q, q_weight), (k, k_weight))
    ]
    return turned[0], turned[1]


def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    frames: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    height: int,
    width: int,
    eps: float,
    theta: float,
    cells: Sequence[int] | None = None,
) -> Tensor:
    """q [B, T, H, D]; k and v are written into the frame slots of k_cache and v_cache."""
    q, k = qk_norm_rope(qkv, q_weight, k_weight, frames, num_heads, height, width, eps, theta, cells)
    start, stop = cells or (0, height * width)
    rows = torch.arange(qkv.shape[0], device=qkv.device)[:, None]
    for cache, new in ((k_cache, k), (v_cache, _split(qkv, num_heads)[2])):
        framed = cache.view(cache.shape[0], -1, stop - start, *cache.shape[2:])
        framed[rows, slots.expand(len(rows), -1).long()] = new.unflatten(1, (-1, stop - start)).to(cache.dtype)
    return q
