"""Public gated_residual_ada_layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import check_eps, check_floats, choose
from .._pointwise import automatic, prepare
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "triton")
_OP = "gated_residual_ada_layer_norm"


def gated_residual_ada_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The end of one transformer sublayer and the start of the next (adaLN, DiT) in one pass over memory.

    The same as ``h = gated_residual(x, y, gate)`` and ``ada_layer_norm(h, shift, scale, eps=eps)``, without reading h
    again.

    Args:
        x, y: [B, T, C]; the F frames' tokens one after another. y may be of another floating dtype.
        gate, shift, scale: [B or 1, F, C], any floating dtype; F divides T. gate None: 1, h = x + y.
        eps: added to the variance.
        impl: "auto" | "reference" | "triton".

    Returns:
        h and its norm, both [B, T, C] contiguous, in the dtype of x; computed in float32 (float64 for float64), each
        rounded once. Differentiable.

    Raises:
        ValueError: shapes do not fit, or impl="triton" cannot take the device or a dtype.
    """
    check_floats(_OP, x=x, y=y, shift=shift, scale=scale)
    if gate is not None:
        check_floats(_OP, x=x, gate=gate)
    check_eps(_OP, eps)
    ok = x.dim() == 3 and x.shape == y.shape
    if not ok:
        raise ValueError(f"{_OP}: x and y must be [B, T, C], got {list(x.shape)}, {list(y.shape)}")
    if gate is not None:
        ok = gate.dim() == 3 and gate.shape[0] in (1, x.shape[0]) and gate.shape[2] == x.shape[2]
        if not ok:
            raise ValueError(f"{_OP}: gate must be [{x.shape[0]} or 1, F, {x.shape[2]}], got {list(gate.shape)}")
    for name, m in (("scale", scale), ("shift", shift)):
        ok = m.dim() == 3 and m.shape[0] in (1, x.shape[0]) and m.shape[2] == x.shape[2] and m.shape == shift.shape
        ok = ok and (gate is None or m.shape[1] == gate.shape[1])
        if not ok:
            frames, like = ("F", "") if gate is None else (gate.shape[1], " like gate")
            raise ValueError(
                f"{_OP}: {name} must be [{x.shape[0]} or 1, {frames}, {x.shape[2]}]{like}, got {list(m.shape)}"
            )
    if choose(_OP, impl, IMPLS, auto=automatic(x, y, gate, shift, scale, norm=True)) == "triton":
        prepare(_OP, norm=True, x=x, y=y, gate=gate, shift=shift, scale=scale)
        return torch.ops.hiar.gated_residual_ada_layer_norm(x, y, gate, shift, scale, eps)
    return reference.gated_residual_ada_layer_norm(x, y.contiguous(), gate, shift, scale, eps)
