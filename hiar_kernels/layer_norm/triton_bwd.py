"""layer_norm in Triton: backward."""

from __future__ import annotations

from torch import Tensor

from .. import _triton_norm
from .._compile import Case
from .._triton import register


def launch(
    grads: list[Tensor], needed: list[bool], x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> list[Tensor]:
    """hiar::layer_norm_backward."""
    wanted = dict(zip(("x", "scale", "shift"), needed, strict=True))
    return _triton_norm.backward("layer_norm", grads, wanted, x, weight, bias, eps)


register("layer_norm_backward", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches."""
    return _triton_norm.backward_cases("grad x scale dx", "dscale dshift")
