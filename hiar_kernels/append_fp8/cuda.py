"""qk_norm_rope_append_fp8 in CUDA C++ (csrc/qk_norm_rope_append_fp8.cu): a block for a token, then one for a tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import cuda_loader
from ..common.float8 import bits
from ..qk_norm_rope.inputs import as_ids, empty_like_q, turns_of
from .inputs import empty_parts, rope_from_schema
from .ops import empty_q


def launch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """hiar::qk_norm_rope_append_fp8_cuda."""
    op = "qk_norm_rope_append_fp8"
    inputs, rings, quantize_q = rope_from_schema(*arguments)
    inputs = inputs.on_device(op)
    rings.validate_layout(op, inputs.qkv)
    q, q_scales = empty_q(inputs, quantize_q)
    if q.numel():
        slots, k = rings.slots if rings.slots.dim() == 3 else rings.slots[None], empty_like_q(inputs)
        torch.ops.hiar_cuda.qk_norm_rope_append_fp8(
            inputs.qkv, inputs.q_weight.contiguous(), inputs.k_weight.contiguous(), as_ids(inputs.frames),
            as_ids(slots), None if rings.rows is None else as_ids(rings.rows),
            turns_of(inputs.head_dim, inputs.theta, q.device), bits(q), q_scales if quantize_q else None, k,
            empty_parts(k, inputs.frames.shape[1], inputs.frame_tokens), bits(rings.k_cache), bits(rings.v_cache),
            rings.k_scales, rings.v_scales, inputs.frame_tokens, inputs.width, inputs.eps,
        )  # fmt: skip
    return q, q_scales


cuda_loader.register("qk_norm_rope_append_fp8_cuda", launch)
