"""rms_norm, eager."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._library import wide_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) weight; float32 or wider inside, rounded once."""
    wide = wide_dtype(x)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype).contiguous()
