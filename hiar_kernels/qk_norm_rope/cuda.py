"""qk_norm_rope_append in CUDA C++ (csrc/qk_norm_rope_append.cu): a block for a token, k and v into the ring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import cuda_loader
from .inputs import append_from_schema, as_ids, empty_like_q, turns_of


def launch(*arguments: Any) -> Tensor:
    """hiar::qk_norm_rope_append_cuda."""
    op = "qk_norm_rope_append"
    inputs, rings = append_from_schema(*arguments)
    inputs = inputs.on_device(op, slots=rings.slots, rows=rings.rows)
    rings.validate_layout(op)
    q = empty_like_q(inputs)
    if q.numel():
        slots = rings.slots if rings.slots.dim() == 3 else rings.slots[None]
        torch.ops.hiar_cuda.qk_norm_rope_append(
            inputs.qkv, inputs.q_weight.contiguous(), inputs.k_weight.contiguous(), as_ids(inputs.frames),
            as_ids(slots), None if rings.rows is None else as_ids(rings.rows),
            turns_of(inputs.head_dim, inputs.theta, q.device), q, rings.k_cache, rings.v_cache, inputs.frame_tokens,
            inputs.first_cell, inputs.width, inputs.eps,
        )  # fmt: skip
    return q


cuda_loader.register("qk_norm_rope_append_cuda", launch)
