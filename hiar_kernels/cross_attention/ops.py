"""``hiar::cross_attention``: schema, fake, autograd (the reference's)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from . import reference


def _fake(q: Tensor, q_weight: Tensor, k: Tensor, v: Tensor, kv_counts: Tensor | None, eps: float) -> Tensor:
    return torch.empty((*q.shape[:2], *k.shape[2:]), dtype=q.dtype, device=q.device)


define(
    "cross_attention",
    "Tensor q, Tensor q_weight, Tensor k, Tensor v, Tensor? kv_counts, float eps",
    1,
    reference.cross_attention,
    _fake,
    (0, 1, 2, 3),
)
