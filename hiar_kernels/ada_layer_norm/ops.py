"""``hiar::ada_layer_norm``: schema, fake, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from . import reference


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


define(
    "ada_layer_norm", "Tensor x, Tensor shift, Tensor scale, float eps", 1, reference.ada_layer_norm, _fake, (0, 1, 2)
)
