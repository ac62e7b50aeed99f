"""gated_residual_ada_layer_norm, eager: one after the other."""

from __future__ import annotations

from torch import Tensor

from .._library import wide_dtype
from ..ada_layer_norm.reference import ada_layer_norm
from ..gated_residual.reference import gated_residual


def gated_residual_ada_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """h = x + gate y (without a gate x + y), rounded, and LN(h) (1 + scale) + shift."""
    if gate is None:
        h = (x.to(wide_dtype(x)) + y.to(wide_dtype(x))).to(x.dtype).contiguous()
    else:
        h = gated_residual(x, y, gate)
    return h, ada_layer_norm(h, shift, scale, eps)
