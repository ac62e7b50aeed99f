"""gated_residual_ada_layer_norm, eager: one after the other."""

from __future__ import annotations

from torch import Tensor

from ..ada_layer_norm.reference import ada_layer_norm
from ..gated_residual.reference import gated_residual


def gated_residual_ada_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """h = x + gate y, rounded, and LN(h) (1 + scale) + shift."""
    h = gated_residual(x, y, gate)
    return h, ada_layer_norm(h, shift, scale, eps)
