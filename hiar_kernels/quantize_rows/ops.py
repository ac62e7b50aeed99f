"""``hiar::quantize_rows``: schema, fake."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.torch_library import define
from . import reference


def _fake(x: Tensor, activation: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    return values, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


define(
    __package__, "quantize_rows", "Tensor x, str? activation, ScalarType dtype", 2, reference.quantize_rows, _fake, ()
)
