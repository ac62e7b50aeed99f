"""Public ada_layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import check_eps, check_floats, choose
from .._pointwise import automatic, prepare
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "triton")


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """Layer norm without affine, then a shift and scale of each frame: LN(x) (1 + scale) + shift (adaLN, DiT).

    Args:
        x: [B, T, C]; the F frames' tokens one after another.
        shift, scale: [B or 1, F, C], any floating dtype; F divides T.
        eps: added to the variance.
        impl: "auto" | "reference" | "triton".

    Returns:
        [B, T, C] contiguous, dtype of x; computed in float32 (float64 for float64) and rounded once. Differentiable.

    Raises:
        ValueError: shapes do not fit, or impl="triton" cannot take the device or a dtype.
    """
    check_floats("ada_layer_norm", x=x, shift=shift, scale=scale)
    check_eps("ada_layer_norm", eps)
    if x.dim() != 3:
        raise ValueError(f"ada_layer_norm: x must be [B, T, C], got {list(x.shape)}")
    for name, m in (("shift", shift), ("scale", scale)):
        if m.dim() != 3 or m.shape[0] not in (1, x.shape[0]) or m.shape[2] != x.shape[2] or m.shape != shift.shape:
            raise ValueError(
                f"ada_layer_norm: {name} must be [{x.shape[0]} or 1, F, {x.shape[2]}], got {list(m.shape)}"
            )
    if choose("ada_layer_norm", impl, IMPLS, auto=automatic(x, shift, scale, norm=True)) == "triton":
        prepare("ada_layer_norm", norm=True, x=x, shift=shift, scale=scale)
        return torch.ops.hiar.ada_layer_norm(x, shift, scale, eps)
    return reference.ada_layer_norm(x, shift, scale, eps)
