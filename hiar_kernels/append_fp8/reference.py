"""append_fp8 and qk_norm_rope_append_fp8, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.float8 import bits, pack_values, quantize_frames, quantize_last
from ..qk_norm_rope import reference as rope
from ..qk_norm_rope.inputs import RopeInputs
from .inputs import Fp8Rings


@torch.no_grad()
def append_fp8(k: Tensor, v: Tensor, rings: Fp8Rings) -> None:
    """Write keys and values [B, T, H, D] of whole frames into the rings, in 8 bits."""
    slots, rows, batch = rings.slots.long(), rings.rows, len(k)
    if rows is None:
        places = [(torch.arange(batch, device=k.device)[:, None], slots.expand(batch, -1))]
    else:
        slots, rows = slots.expand(-1, batch, -1), rows.long()[:, :, None]
        places = [(rows[0], slots[0])]
        for row, slot in zip(rows[1:], slots[1:], strict=True):  # -1: once more into the first
            places.append((torch.where(row >= 0, row, rows[0]), torch.where(row >= 0, slot, slots[0])))
    count = slots.shape[-1]
    k_values, k_scale = quantize_frames(k.unflatten(1, (count, -1)))
    v_values, v_scale = quantize_frames(v.unflatten(1, (count, -1)))
    v_values = pack_values(v_values)
    k_cache = bits(rings.k_cache).unflatten(1, (-1, k.shape[1] // count))
    for place in places:
        k_cache[place] = bits(k_values)
        bits(rings.v_cache)[place] = bits(v_values)
        rings.k_scales[place] = k_scale
        rings.v_scales[place] = v_scale


@torch.no_grad()
def qk_norm_rope_append_fp8(inputs: RopeInputs, rings: Fp8Rings, quantize_q: bool) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D] in the dtype of qkv and no scales, or in 8 bits with one for each token and head."""
    q, k = rope.qk_norm_rope(inputs)
    append_fp8(k, inputs.qkv[..., -inputs.q_weight.numel() :].unflatten(-1, (inputs.num_heads, -1)), rings)
    return quantize_last(q) if quantize_q else (q, q.new_empty(0, dtype=torch.float32))
