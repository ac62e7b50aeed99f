"""qk_norm_rope and qk_norm_rope_append, eager."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.torch_library import remembered, wide_dtype
from .inputs import Rings, RopeInputs


def rope_angles(
    frames: Tensor, height: int, width: int, head_dim: int, theta: float, cells: Sequence[int] | None = None
) -> Tensor:
    """Angles float64 [B, F * tokens, head_dim / 2] of 3D RoPE (Wan2.1; RoFormer, arXiv 2104.09864).

    The c = head_dim / 2 pairs are split c - 2 (c // 3), c // 3, c // 3 over (frame, row, column); each axis has the
    frequencies of its own even dimension. Absolute frame ids in float64: exact at frame 1,000,000 and beyond. Tokens
    are the cells [start, stop) of every frame, all height * width of them by default.
    """
    pairs = head_dim // 2
    side = pairs // 3

    def count(n: int) -> Tensor:
        return torch.arange(n, device=frames.device, dtype=torch.float64)

    along, across = (theta ** (count(n) / -max(n, 1)) for n in (pairs - 2 * side, side))
    t = frames.to(torch.float64)[:, :, None, None, None] * along
    y, x = (count(n)[:, None] * across for n in (height, width))
    of_tokens = torch.cat([axis.expand(*frames.shape, height, width, -1) for axis in (t, y[:, None], x)], -1)
    start, stop = cells or (0, height * width)
    return of_tokens.flatten(2, 3)[:, :, start:stop].flatten(1, 2)


def rope_turns(inputs: RopeInputs, dtype: torch.dtype) -> Tensor:
    """cos + i sin of :func:`rope_angles`, each rounded to ``dtype``: complex [B, F * tokens, head_dim / 2]."""
    cells = inputs.cells and tuple(inputs.cells)
    options = (inputs.height, inputs.width, inputs.head_dim, inputs.theta, cells)

    def make() -> Tensor:
        angles = rope_angles(inputs.frames, *options)
        return torch.complex(angles.cos().to(dtype), angles.sin().to(dtype))

    return remembered(inputs.frames, (*options, dtype), make)


def qk_norm_rope(inputs: RopeInputs) -> tuple[Tensor, Tensor]:
    """Normed and rotated q, k [B, T, H, D]; float32 or wider inside, rounded once. Adjacent pairs of a head turn as
    complex numbers.
    """
    qkv, heads = inputs.qkv, inputs.num_heads
    wide = wide_dtype(qkv)
    x = qkv.narrow(-1, 0, 2 * inputs.q_weight.numel()).unflatten(-1, (2, -1)).to(wide)  # q and k
    scaled = x * x.square().mean(-1, keepdim=True).add_(inputs.eps).rsqrt_()
    turns = rope_turns(inputs, wide).unsqueeze(2)
    rotated = []
    for one, weight in zip(scaled.unbind(2), (inputs.q_weight, inputs.k_weight), strict=True):
        pairs = torch.view_as_complex((one * weight.to(wide)).contiguous().unflatten(-1, (heads, -1, 2)))
        rotated.append(torch.view_as_real(pairs * turns).flatten(-2).to(qkv.dtype))
    return rotated[0], rotated[1]


def qk_norm_rope_append(inputs: RopeInputs, rings: Rings) -> Tensor:
    """q [B, T, H, D]; k and v are written into the frame slots of the rings."""
    q, k = qk_norm_rope(inputs)
    qkv, rows, batch, slots = inputs.qkv, rings.rows, len(inputs.qkv), rings.slots.long()
    v = qkv[..., 2 * inputs.q_weight.numel() :].unflatten(-1, (inputs.num_heads, -1))
    if rows is not None:
        rows, slots = rows.long()[:, :, None], slots.expand(-1, batch, -1)
    for cache, new in ((rings.k_cache, k), (rings.v_cache, v)):
        framed = cache.unflatten(1, (-1, inputs.frame_tokens))
        new = new.unflatten(1, (-1, inputs.frame_tokens)).to(cache.dtype)
        if rows is not None:
            framed[rows[0], slots[0]] = new
            for row, slot in zip(rows[1:], slots[1:], strict=True):  # -1: once more into the first
                framed[torch.where(row >= 0, row, rows[0]), torch.where(row >= 0, slot, slots[0])] = new
        elif batch == 1:
            framed.index_copy_(1, slots[0], new)
        else:
            framed[torch.arange(batch, device=qkv.device)[:, None], slots.expand(batch, -1)] = new
    return q
