"""Rows in 8 bits: e4m3 with one float32 scale for each row, as the 8-bit ops and their references state it."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros


def quantize_last(y: Tensor) -> tuple[Tensor, Tensor]:
    """y [..., C] -> e4m3 [..., C] and the scale of each row, float32 [...]: y is nearly values * scale.

    In float32: scale = max|row| / 448, values = y / scale, to the nearest, ties to even. A row with a number that is
    not finite is NaN, with scale 1.
    """
    y = y.float().contiguous()
    amax = y.abs().amax(-1)
    scale = torch.where(amax.isfinite(), (amax / LARGEST).clamp_min(SMALLEST_SCALE), torch.nan)
    values = y / scale[..., None]  # at most 448 but for rounding of the scale, which may lift it to 448 (1 + 2^-23)
    return values.clamp(-LARGEST, LARGEST).to(E4M3), scale.nan_to_num(nan=1.0)
