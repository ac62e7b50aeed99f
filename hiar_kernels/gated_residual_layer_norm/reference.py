"""gated_residual_layer_norm, eager: one after the other."""

from __future__ import annotations

from torch import Tensor

from ..gated_residual.reference import gated_residual
from ..layer_norm.reference import layer_norm


def gated_residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """h = x + gate y, rounded, and LN(h) weight + bias."""
    h = gated_residual(x, y, gate)
    return h, layer_norm(h, weight, bias, eps)
