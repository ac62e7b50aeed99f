"""Keys and values in 8 bits: e4m3 with one float32 scale for each frame and head.

Each frame of a head is divided by amax / 448, so that its largest number becomes the format's largest. The rounding
error of x is at most |x| / 16, or scale / 1024 below the normal numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # for frames of zeros, to avoid dividing by 0


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., P, H, D], P tokens of a frame -> e4m3 of that shape and its scales, float32 [..., H], finite and > 0.

    Runs on the device alone, and each frame and head by itself: the result does not depend on the batch. A number that
    is not finite makes its frame and head NaN. Numbers beyond 448, which torch versions cast differently, never occur.
    """
    amax = torch.linalg.vector_norm(x, float("inf"), dim=(-3, -1))
    scale = (amax.float() / LARGEST).clamp(min=_SMALLEST_SCALE).nan_to_num(nan=float("nan"), posinf=float("nan"))
    values = (x / scale[..., None, :, None]).to(E4M3)
    return values, scale.nan_to_num(nan=1.0)


def dequantize(values: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """values e4m3 [..., P, H, D] times scale [..., H] into ``out``, rounded once; returns it."""
    out.copy_(values)  # exact: every wider format holds these numbers
    return out.mul_(scale[..., None, :, None])


def bits(x: Tensor) -> Tensor:
    """x as a dtype that torch can index: e4m3 as bytes."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x
