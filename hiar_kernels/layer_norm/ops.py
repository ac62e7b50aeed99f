"""``hiar::layer_norm``: schema, fake, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from . import reference


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


define("layer_norm", "Tensor x, Tensor weight, Tensor bias, float eps", 1, reference.layer_norm, _fake, (0, 1, 2))
