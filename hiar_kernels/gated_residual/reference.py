"""gated_residual, eager."""

from __future__ import annotations

from torch import Tensor

from .._library import frames_of, wide_dtype


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y with one gate for each frame; float32 or wider inside, rounded once."""
    wide = wide_dtype(x)
    tokens = frames_of(x, gate.shape[1], "gated_residual")
    gated = y.to(wide).unflatten(1, (-1, tokens)) * gate.to(wide)[:, :, None]
    return (x.to(wide) + gated.flatten(1, 2)).to(x.dtype).contiguous()
