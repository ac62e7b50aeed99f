"""ada_layer_norm, eager."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import frames_of, wide_dtype


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LN(x) (1 + scale) + shift with one shift and scale for each frame; float32 or wider inside, rounded once."""
    b, t, c = x.shape
    wide = wide_dtype(x)
    tokens = frames_of(x, shift.shape[1], "ada_layer_norm")
    y = F.layer_norm(x.to(wide), (c,), eps=eps).view(b, shift.shape[1], tokens, c)
    y = torch.addcmul(shift.to(wide).unsqueeze(2), y, 1 + scale.to(wide).unsqueeze(2))
    return y.view(b, t, c).to(x.dtype)
