"""``hiar::int8_linear``: schema, fake."""

from __future__ import annotations

from torch import Tensor

from ..common.torch_library import define
from . import reference


def _fake(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    return bias.new_empty((*x.shape[:-1], weight.shape[0]))


_ARGUMENTS = "Tensor x, Tensor x_scales, Tensor weight, Tensor weight_scales, Tensor bias"
define(__package__, "int8_linear", _ARGUMENTS, 1, reference.int8_linear, _fake, ())
