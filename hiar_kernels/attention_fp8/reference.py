"""attention_fp8, eager: the oracle, which states the arithmetic of 8-bit products."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.float8 import E4M3, bits, unpack_values
from ..common.torch_library import own_arithmetic
from .inputs import BLOCK, P_SCALE, QuantizedRowss


@own_arithmetic
def attention_fp8(call: QuantizedRowss) -> Tensor:
    """[B, Tq, H, D]. A query that sees no key gives 0; what no query sees may hold anything."""
    mask, q = call.mask, call.q
    wide = torch.promote_types(call.result, torch.float32)
    seen = mask.visible(call.q_frames, call.kv_frames, q.shape[0])  # [B, Fq, S]
    used = seen.any(1)
    k = bits(call.k).unflatten(1, (-1, mask.frame_tokens)).where(used[:, :, None, None, None], 0).view(E4M3)
    v = unpack_values(bits(call.v).where(used[:, :, None, None, None], 0).view(E4M3), mask.frame_tokens)
    k_scales, v_scales = (x.where(used[:, :, None], 0).to(wide) for x in (call.k_scales, call.v_scales))
    # products of two 8-bit numbers are exact
    rows, keys, values = (x.to(wide).flatten(1, -3).transpose(1, 2).contiguous() for x in (q, k, v))
    scores = _by_row(rows, keys.transpose(2, 3)).unflatten(3, k.shape[1:3])  # [B, H, Tq, S, P]
    factors = torch.tensor(call.softmax_scale, dtype=wide, device=q.device)
    if call.q_scales is not None:
        factors = (call.q_scales.to(wide) * factors).transpose(1, 2)[..., None]
    scores = scores * (factors * k_scales.transpose(1, 2)[:, :, None])[..., None]
    scores = scores.masked_fill(~seen.repeat_interleave(mask.frame_tokens, 1)[:, None, :, :, None], -math.inf)
    probs, l_i = _softmax_in_blocks(scores) if call.eight_bits else _softmax(scores)
    probs = probs * v_scales.transpose(1, 2)[:, :, None, :, None]
    out = _by_row(probs.flatten(3), values) / l_i.where(l_i != 0, 1)[..., None]
    return out.transpose(1, 2).to(call.result).contiguous()


def _by_row(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, one batch item after another: the CPU's library adds in an order that depends on how many there are."""
    return torch.stack([torch.bmm(x, y) for x, y in zip(a, b, strict=True)]) if len(a) else a @ b


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """exp(scores - their maximum) [B, H, Tq, S, P] and the sum of each row.

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
    exact = torch.exp(blocks - m_i)
    later = torch.exp(m_i - m_i[..., -1:, :])  # the product of all rescaling to come
    rounded = (exact * P_SCALE).to(E4M3).to(exact.dtype) / P_SCALE
    probs = (rounded * later).unflatten(-2, (scores.shape[-2], -1)).flatten(-2)[..., :tokens]
    return probs, (exact * later).sum((-2, -1))
