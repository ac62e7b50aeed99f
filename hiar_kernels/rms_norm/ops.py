"""``hiar::rms_norm``: schema, fake, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from . import reference


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


define("rms_norm", "Tensor x, Tensor weight, float eps", 1, reference.rms_norm, _fake, (0, 1))
