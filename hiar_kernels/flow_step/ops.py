"""``hiar::flow_step``: schema, fake, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.torch_library import define
from . import reference


def _fake(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))  # type: ignore[return-value]


define(
    __package__,
    "flow_step",
    "Tensor x, Tensor velocity, Tensor sigma, Tensor sigma_next, Tensor? noise",
    2,
    reference.flow_step,
    _fake,
    (0, 1, 4),
)
