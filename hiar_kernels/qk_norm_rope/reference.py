"""qk_norm_rope and qk_norm_rope_append, eager."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import remembered, wide_dtype


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


def rope_turns(
    frames: Tensor,
    height: int,
    width: int,
    head_dim: int,
    theta: float,
    cells: Sequence[int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """cos + i sin of :func:`rope_angles`, each rounded to ``dtype``: complex [B, F * tokens, head_dim / 2]."""

    def make() -> Tensor:
        angles = rope_angles(frames, height, width, head_dim, theta, cells)
        return torch.complex(angles.cos().to(dtype), angles.sin().to(dtype))

    return remembered(frames, (height, width, head_dim, theta, cells and tuple(cells), dtype), make)


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
    """Normed and rotated q, k [B, T, H, D]; float32 or wider inside, rounded once. Adjacent pairs of a head turn as
    complex numbers.
    """
    wide = wide_dtype(qkv)
    x = qkv.narrow(-1, 0, 2 * q_weight.numel()).unflatten(-1, (2, -1)).to(wide)  # q and k
    scaled = x * x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    turns = rope_turns(frames, height, width, x.shape[-1] // num_heads, theta, cells, wide).unsqueeze(2)
    turned = []
    for one, weight in zip(scaled.unbind(2), (q_weight, k_weight), strict=True):
        pairs = torch.view_as_complex((one * weight.to(wide)).unflatten(-1, (num_heads, -1, 2)))
        turned.append(torch.view_as_real(pairs * turns).flatten(-2).to(qkv.dtype))
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
    rows: Tensor | None = None,
) -> Tensor:
    """q [B, T, H, D]; k and v are written into the frame slots of k_cache and v_cache."""
    q, k = qk_norm_rope(qkv, q_weight, k_weight, frames, num_heads, height, width, eps, theta, cells)
    start, stop = cells or (0, height * width)
    v, batch, slots = qkv[..., 2 * q_weight.numel() :].unflatten(-1, (num_heads, -1)), len(qkv), slots.long()
    if rows is not None:
        rows, slots = rows.long()[:, :, None], slots.expand(-1, batch, -1)
    for cache, new in ((k_cache, k), (v_cache, v)):
        framed = cache.unflatten(1, (-1, stop - start))
        new = new.unflatten(1, (-1, stop - start)).to(cache.dtype)
        if rows is not None:
            framed[rows[0], slots[0]] = new
            for row, slot in zip(rows[1:], slots[1:], strict=True):  # nowhere: once more into the first
                framed[torch.where(row >= 0, row, rows[0]), torch.where(row >= 0, slot, slots[0])] = new
        elif batch == 1:
            framed[0].index_copy_(0, slots[0], new[0])
        else:
            framed[torch.arange(batch, device=qkv.device)[:, None], slots.expand(batch, -1)] = new
    return q
