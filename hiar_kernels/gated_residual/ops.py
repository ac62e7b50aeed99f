"""``hiar::gated_residual``: schema, fake, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from . import reference


def _fake(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


define("gated_residual", "Tensor x, Tensor y, Tensor gate", 1, reference.gated_residual, _fake, (0, 1, 2))
