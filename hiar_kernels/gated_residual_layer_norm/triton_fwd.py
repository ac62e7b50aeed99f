"""gated_residual_layer_norm in Triton: forward."""

from __future__ import annotations

from torch import Tensor

from .. import _triton_norm
from .._compile import Case
from .._triton import register


def launch(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """hiar::gated_residual_layer_norm."""
    return _triton_norm.forward("gated_residual_layer_norm", x, weight, bias, eps, y=y, gate=gate)


register("gated_residual_layer_norm", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches."""
    return _triton_norm.forward_cases("x y scale shift h out", "gate")
