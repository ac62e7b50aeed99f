"""Public gated_residual_layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import check_eps, check_floats, choose
from .._pointwise import automatic, prepare
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "triton")
_OP = "gated_residual_layer_norm"


def gated_residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """A gated residual and the affine layer norm after it (in Wan: before cross-attention) in one pass over memory.

    The same as ``h = gated_residual(x, y, gate)`` and ``layer_norm(h, weight, bias, eps=eps)``, without reading h
    again.

    >>> x, y, one = torch.zeros(1, 1, 2), torch.tensor([[[2.0, 0.0]]]), torch.ones(1, 1, 2)
    >>> gated_residual_layer_norm(x, y, one, one[0, 0], x[0, 0])
    (tensor([[[2., 0.]]]), tensor([[[ 1.0000, -1.0000]]]))

    Args:
        x, y: [B, T, C]; the F frames' tokens one after another. y may be of another floating dtype.
        gate: [B or 1, F, C], any floating dtype; F divides T. weight, bias: [C], any floating dtype.
        eps: added to the variance.
        impl: "auto" | "reference" | "triton".

    Returns:
        h and its norm, both [B, T, C] contiguous, in the dtype of x; computed in float32 (float64 for float64), each
        rounded once. Differentiable.

    Raises:
        ValueError: shapes do not fit, or impl="triton" cannot take the device or a dtype.
    """
    check_floats(_OP, x=x, y=y, gate=gate, weight=weight, bias=bias)
    check_eps(_OP, eps)
    ok = x.dim() == 3 and x.shape == y.shape
    if not ok:
        raise ValueError(f"{_OP}: x and y must be [B, T, C], got {list(x.shape)}, {list(y.shape)}")
    ok = gate.dim() == 3 and gate.shape[0] in (1, x.shape[0]) and gate.shape[2] == x.shape[2]
    if not ok:
        raise ValueError(f"{_OP}: gate must be [{x.shape[0]} or 1, F, {x.shape[2]}], got {list(gate.shape)}")
    for name, p in (("weight", weight), ("bias", bias)):
        if tuple(p.shape) != x.shape[2:]:
            raise ValueError(f"{_OP}: {name} must be {list(x.shape[2:])}, got {list(p.shape)}")
    if choose(_OP, impl, IMPLS, auto=automatic(x, y, gate, weight, bias, norm=True)) == "triton":
        prepare(_OP, norm=True, x=x, y=y, gate=gate, weight=weight, bias=bias)
        return torch.ops.hiar.gated_residual_layer_norm(x, y, gate, weight, bias, eps)
    return reference.gated_residual_layer_norm(x, y.contiguous(), gate, weight, bias, eps)
