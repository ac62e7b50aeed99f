"""``hiar::gated_residual_layer_norm``: schema, fake, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from . import reference


def _fake(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))  # type: ignore[return-value]


define(
    "gated_residual_layer_norm",
    "Tensor x, Tensor y, Tensor gate, Tensor weight, Tensor bias, float eps",
    2,
    reference.gated_residual_layer_norm,
    _fake,
    (0, 1, 2, 3, 4),
)
