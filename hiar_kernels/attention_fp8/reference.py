"""attention_fp8, eager: the oracle, which states the arithmetic of 8-bit products."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.float8 import E4M3, bits, nearest_, unpack_values, widened
from ..common.torch_library import own_arithmetic
from .inputs import BLOCK, P_SCALE, Float8Inputs


@own_arithmetic
def attention_fp8(call: Float8Inputs) -> Tensor:
    """[B, Tq, H, D]. A query that sees no key gives 0; what no query sees may hold anything."""
    mask, q = call.mask, call.q
    wide = torch.promote_types(call.result, torch.float32)
    seen = mask.visible(call.q_frames, call.kv_frames, q.shape[0])  # [B, Fq, S]
    used = seen.any(1)
    k = (bits(call.k).unflatten(1, (-1, mask.frame_tokens)) * used[:, :, None, None, None]).view(E4M3)
    v = unpack_values((bits(call.v) * used[:, :, None, None, None]).view(E4M3), mask.frame_tokens)
    k_scales, v_scales = (x.where(used[:, :, None], 0).to(wide).mT for x in (call.k_scales, call.v_scales))
    # products of two 8-bit numbers are exact
    rows, keys, values = (widened(x.flatten(1, -3).transpose(1, 2).contiguous(), wide) for x in (q, k, v))
    factors = torch.tensor(call.softmax_scale, dtype=wide, device=q.device)
    if call.q_scales is not None:
        factors = (call.q_scales.to(wide) * factors).mT[..., None]
    factors, hidden = factors * k_scales[:, :, None], ~seen.repeat_interleave(mask.frame_tokens, 1)
    out = torch.empty(q.shape, dtype=call.result, device=q.device)
    for b in range(len(q)):  # apart: a CPU's library adds in an order that depends on how many there are
        scores = (rows[b] @ keys[b].mT).unflatten(2, k.shape[1:3])  # [H, Tq, S, P]
        scores.mul_(factors[b, ..., None]).masked_fill_(hidden[b, :, :, None], -math.inf)
        probs, l_i = _softmax_in_blocks(scores) if call.eight_bits else _softmax(scores)
        sums = probs.mul_(v_scales[b, :, None, :, None]).flatten(2) @ values[b]
        out[b] = (sums / l_i.where(l_i != 0, 1)[..., None]).transpose(0, 1)
    return out


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """exp(scores - their maximum) [H, Tq, S, P] and the sum of each row.

    Not exp2, of which torch 2.13 gives other bits on a CPU at the end of a tensor: a row would depend on the batch.
    """
    m_i = scores.amax((-2, -1), keepdim=True) if scores.numel() else scores.new_zeros(())
    probs = torch.exp(scores - m_i.where(m_i != -math.inf, 0))
    return probs, probs.sum((-2, -1))


def _softmax_in_blocks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The same as a kernel has it that goes from block to block with the highest score so far: each block's
    probabilities are rounded to e4m3 relative to that, and what came before is rescaled. The sum is of probabilities
    before they are rounded.
    """
    tokens = scores.shape[-1]
    size = min(BLOCK, tokens)
    blocks = F.pad(scores, (0, -tokens % size), value=-math.inf).unflatten(-1, (-1, size)).flatten(-3, -2)
    m_i = blocks.amax(-1).cummax(-1).values.unsqueeze(-1)  # so far
    m_i = m_i.where(m_i != -math.inf, 0)
    exact = blocks.sub_(m_i).exp_()
    later = torch.exp(m_i - m_i[..., -1:, :])  # the product of all rescaling to come
    rounded = nearest_(exact * P_SCALE).div_(P_SCALE).mul_(later)
    probs = rounded.unflatten(-2, (scores.shape[-2], -1)).flatten(-2)[..., :tokens]
    return probs, exact.mul_(later).sum((-2, -1))
