"""gated_residual_ada_layer_norm in Triton: backward."""

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
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> list[Tensor]:
    """hiar::gated_residual_ada_layer_norm_backward."""
    given = ("x", "y", "shift", "scale") if gate is None else ("x", "y", "gate", "shift", "scale")
    wanted = dict(zip(given, needed, strict=True))
    return _triton_norm.backward("gated_residual_ada_layer_norm", grads, wanted, x, scale, shift, eps, y=y, gate=gate)


register("gated_residual_ada_layer_norm_backward", launch)


def compile_cases(arch: int) -> list[Case]:
    """Production launches."""
    return [
        *_triton_norm.backward_cases("dh grad x y dx dy", "gate scale dgate dshift dscale", per_frame=True),
        *_triton_norm.backward_cases("dh grad x y dx dy", "scale dshift dscale", per_frame=True, label=", no gate"),
    ]
