"""layer_norm in Triton: forward."""

from __future__ import annotations

from torch import Tensor

from .. import _triton_norm
from .._compile import Case
from .._triton import register


def launch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """hiar::layer_norm."""
    return _triton_norm.forward("layer_norm", x, weight, bias, eps)[1]


register("layer_norm", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches."""
    return _triton_norm.forward_cases("x scale shift out", "")
