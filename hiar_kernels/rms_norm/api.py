"""Public rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import check_eps, check_floats, choose
from .._pointwise import automatic, prepare
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "triton")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) times a weight, over the last dimension (RMSNorm, arXiv 1910.07467).

    >>> rms_norm(torch.tensor([[[3.0, -3.0]]]), torch.ones(2))
    tensor([[[ 1., -1.]]])

    Args:
        x: [B, T, C]. weight: [C], any floating dtype.
        eps: added to the mean square.
        impl: "auto" | "reference" | "triton".

    Returns:
        [B, T, C], dtype of x; computed in float32 (float64 for float64) and rounded once. Differentiable.

    Raises:
        ValueError: shapes do not fit, or impl="triton" cannot take the device or a dtype.
    """
    check_floats("rms_norm", x=x, weight=weight)
    check_eps("rms_norm", eps)
    if x.dim() != 3:
        raise ValueError(f"rms_norm: x must be [B, T, C], got {list(x.shape)}")
    fits = tuple(weight.shape) == x.shape[2:]
    if not fits:
        raise ValueError(f"rms_norm: weight must be {list(x.shape[2:])}, got {list(weight.shape)}")
    if choose("rms_norm", impl, IMPLS, auto=automatic(x, weight, norm=True)) == "triton":
        prepare("rms_norm", norm=True, x=x, weight=weight)
        return torch.ops.hiar.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)
