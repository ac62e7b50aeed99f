"""quantize_rows, eager."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.float8 import quantize_last


@torch.no_grad()
def quantize_rows(x: Tensor, activation: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in 8 bits [..., C] and scales float32 [...] of x, or of its GELU."""
    y = x.float()
    return quantize_last(y if activation is None else F.gelu(y, approximate="tanh"), dtype)
