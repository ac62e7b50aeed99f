# mypy: allow-incomplete-defs
"""What the two directions of the Triton flow_step share: latents [B, F, C, H, W] as frames of n numbers in a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = {"BLOCK": 1024, "num_warps": 4}


def dense_frames(x: Tensor) -> Tensor:
    """x itself if each frame is dense in memory (any strides of B and F), else a dense copy."""
    _, _, channels, height, width = x.shape
    dense = all(
        size == 1 or stride == dense_stride
        for size, stride, dense_stride in zip((channels, height, width), x.stride()[2:], (height * width, width, 1))
    )
    return x if dense else x.contiguous()


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Strides of B and F under the names that the kernels use; 0 repeats a single row."""
    b, f = (0, 0) if x is None else (0 if n == 1 else s for n, s in zip(x.shape[:2], x.stride()[:2]))
    return {f"stride_{name}b": b, f"stride_{name}f": f}


@triton.jit
def piece(F, n, tiles, BLOCK: tl.constexpr):
    """(row of the batch, frame, numbers of the frame [BLOCK], where they stand in a dense tensor, which exist)."""
    pid = tl.program_id(0)
    frame = (pid // tiles).to(tl.int64)
    i = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    return frame // F, frame % F, i, frame * n + i, i < n
