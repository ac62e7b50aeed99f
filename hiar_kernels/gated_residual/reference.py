"""gated_residual, eager."""

from __future__ import annotations

from torch import Tensor

from .._library import frames_of, wide_dtype


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y with one gate for each frame; float32 or wider inside, rounded once."""
    b, t, c = x.shape
    wide = wide_dtype(x)
    tokens = frames_of(x, gate.shape[1], "gated_residual")
    gated = y.to(wide).view(b, -1, tokens, c) * gate.to(wide)[:, :, None]
    return (x.to(wide) + gated.view(b, t, c)).to(x.dtype)
