"""Public gated_residual."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import check_floats, choose
from .._pointwise import automatic, prepare
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "triton")


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, impl: str = "auto") -> Tensor:
    """x + gate y, one gate vector for each frame (adaLN, DiT).

    Args:
        x, y: [B, T, C]; the F frames' tokens one after another. y may be of another floating dtype.
        gate: [B or 1, F, C], any floating dtype; F divides T.
        impl: "auto" | "reference" | "triton".

    Returns:
        [B, T, C] contiguous, dtype of x; computed in float32 (float64 for float64) and rounded once. Differentiable.

    Raises:
        ValueError: shapes do not fit, or impl="triton" cannot take the device or a dtype.
    """
    check_floats("gated_residual", x=x, y=y, gate=gate)
    if x.dim() != 3 or x.shape != y.shape:
        raise ValueError(f"gated_residual: x and y must be [B, T, C], got {list(x.shape)}, {list(y.shape)}")
    if gate.dim() != 3 or gate.shape[0] not in (1, x.shape[0]) or gate.shape[2] != x.shape[2]:
        raise ValueError(f"gated_residual: gate must be [{x.shape[0]} or 1, F, {x.shape[2]}], got {list(gate.shape)}")
    if choose("gated_residual", impl, IMPLS, auto=automatic(x, y, gate)) == "triton":
        prepare("gated_residual", x=x, y=y, gate=gate)
        return torch.ops.hiar.gated_residual(x, y, gate)
    return reference.gated_residual(x, y.contiguous(), gate)
