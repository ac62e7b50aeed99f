"""``hiar::attention_fp8``: schema, fake. No gradient: 8 bits are for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.torch_library import define
from . import reference
from .inputs import Float8Inputs


def _eager(*arguments: Any) -> Tensor:
    return reference.attention_fp8(Float8Inputs.from_schema(*arguments))


def _fake(q: Tensor, *others: Any) -> Tensor:
    return torch.empty(q.shape, dtype=others[-1], device=q.device)


define(
    __package__, "attention_fp8",
    "Tensor q, Tensor k, Tensor v, Tensor k_scales, Tensor v_scales, Tensor? q_scales, Tensor q_frames, "
    "Tensor kv_frames, int[] rule, int[] windows, float scale, ScalarType out_dtype", 1, _eager, _fake, (),
)  # fmt: skip
