"""gated_residual_layer_norm in Triton: backward."""

from __future__ import annotations

from torch import Tensor

from .. import _triton_norm
from .._compile import Case
from .._triton import register


def launch(
    grads: list[Tensor],
    needed: list[bool],
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> list[Tensor]:
    """hiar::gated_residual_layer_norm_backward."""
    wanted = dict(zip(("x", "y", "gate", "scale", "shift"), needed, strict=True))
    return _triton_norm.backward("gated_residual_layer_norm", grads, wanted, x, weight, bias, eps, y=y, gate=gate)


register("gated_residual_layer_norm_backward", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches."""
    return _triton_norm.backward_cases("dh grad x y scale dx dy", "gate dgate dshift dscale")
