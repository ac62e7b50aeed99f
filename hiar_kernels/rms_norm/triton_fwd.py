"""rms_norm in Triton: forward."""

from __future__ import annotations

from torch import Tensor

from .. import _triton_norm
from .._compile import Case
from .._triton import register


def launch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hiar::rms_norm."""
    return _triton_norm.forward("rms_norm", x, weight, None, eps, rms=True)[1]


register("rms_norm", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches."""
    return _triton_norm.forward_cases("x scale out", "", rms=True)
