"""Keys and values in 8 bits: e4m3 with one float32 scale for each frame and head.

A head's frame is divided by amax / 448, so that its largest number is the largest of the format. Of a number x between
the normal ones an error of |x| / 16 at most is left, below them one of scale / 1024.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a frame of zeros: nothing is divided by 0


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., P, H, D], P tokens of a frame -> e4m3 of that shape and its scales, float32 [..., H], finite and > 0.

    Operations on the device alone, each number by itself: what x holds decides, not how many frames come together.
    What is not finite makes NaN of its whole head and frame. Nothing depends on what torch's cast does beyond 448 (2.13
    makes 448 of it, of infinities too): nothing beyond is ever cast.
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
    """x as torch can index it: bytes where it is e4m3."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x
