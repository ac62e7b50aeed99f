"""Public layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import check_eps, check_floats, choose
from .._pointwise import automatic, prepare
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "triton")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """Layer norm over the last dimension with affine weight and bias.

    Args:
        x: [B, T, C]. weight, bias: [C], any floating dtype.
        eps: added to the variance.
        impl: "auto" | "reference" | "triton".

    Returns:
        [B, T, C], dtype of x; computed in float32 (float64 for float64) and rounded once. Differentiable.

    Raises:
        ValueError: shapes do not fit, or impl="triton" cannot take the device or a dtype.
    """
    check_floats("layer_norm", x=x, weight=weight, bias=bias)
    check_eps("layer_norm", eps)
    if x.dim() != 3:
        raise ValueError(f"layer_norm: x must be [B, T, C], got {list(x.shape)}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p.shape != x.shape[2:]:
            raise ValueError(f"layer_norm: {name} must be {list(x.shape[2:])}, got {list(p.shape)}")
    if choose("layer_norm", impl, IMPLS, auto=automatic(x, weight, bias, norm=True)) == "triton":
        prepare("layer_norm", norm=True, x=x, weight=weight, bias=bias)
        return torch.ops.hiar.layer_norm(x, weight, bias, eps)
    return reference.layer_norm(x, weight, bias, eps)
