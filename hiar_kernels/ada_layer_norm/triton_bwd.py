"""ada_layer_norm in Triton: backward."""

from __future__ import annotations

from torch import Tensor

from .. import _triton_norm
from .._compile import Case
from .._triton import register
from .._triton_rows import WAN, sum_partials_case


def launch(
    grads: list[Tensor], needed: list[bool], x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> list[Tensor]:
    """hiar::ada_layer_norm_backward."""
    wanted = dict(zip(("x", "shift", "scale"), needed, strict=True))
    return _triton_norm.backward("ada_layer_norm", grads, wanted, x, scale, shift, eps)


register("ada_layer_norm_backward", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches."""
    return [
        *_triton_norm.backward_cases("grad x dx", "scale dshift dscale", per_frame=True),
        *map(sum_partials_case, WAN),
    ]
