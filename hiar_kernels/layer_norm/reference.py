"""layer_norm, eager."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._library import wide_dtype


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LN(x) weight + bias; float32 or wider inside, rounded once."""
    wide = wide_dtype(x)
    return F.layer_norm(x.to(wide), (x.shape[-1],), weight.to(wide), bias.to(wide), eps).to(x.dtype)
