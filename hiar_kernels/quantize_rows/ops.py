"""``hiar::quantize_rows``: schema, fake."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.float8 import E4M3
from ..common.torch_library import define
from . import reference


def _fake(x: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=E4M3, device=x.device)
    return values, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


define(__package__, "quantize_rows", "Tensor x, str? activation", 2, reference.quantize_rows, _fake, ())
