"""ada_layer_norm in Triton: forward."""

from __future__ import annotations

from torch import Tensor

from .. import _triton_norm
from .._compile import Case
from .._triton import register


def launch(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """hiar::ada_layer_norm."""
    return _triton_norm.forward("ada_layer_norm", x, scale, shift, eps)[1]


register("ada_layer_norm", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches."""
    return _triton_norm.forward_cases("x out", "shift scale", per_frame=True)
