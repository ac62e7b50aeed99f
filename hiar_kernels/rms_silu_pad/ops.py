"""``hiar::rms_silu_pad``: schema, fake, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.torch_library import define
from . import reference
from .layout import CACHE_FRAMES, format_of


def _fake(x: Tensor, weight: Tensor, cache: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    batch, channels, frames, *size = x.shape
    results = [
        torch.empty((batch, channels, n, *size), dtype=x.dtype, device=x.device, memory_format=format_of(x))
        for n in (frames + CACHE_FRAMES, CACHE_FRAMES)
    ]
    return results[0], results[1]


define(
    __package__,
    "rms_silu_pad",
    "Tensor x, Tensor weight, Tensor? cache, float eps",
    2,
    reference.rms_silu_pad,
    _fake,
    (0, 1, 2),
)
