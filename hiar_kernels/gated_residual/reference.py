"""gated_residual, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import frames_of, wide_dtype


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y with one gate for each frame; float32 or wider inside, rounded once."""
    wide = wide_dtype(x)
    tokens = frames_of(x, gate.shape[1], "gated_residual")
    x_frames, y_frames = (z.to(wide).unflatten(1, (gate.shape[1], tokens)) for z in (x, y))
    return torch.addcmul(x_frames, y_frames, gate.to(wide).unsqueeze(2)).reshape(x.shape).to(x.dtype).contiguous()
