"""Attention, eager: the dense oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.torch_library import own_arithmetic
from .inputs import AttentionInputs
from .mask import BlockCausal, visible_with_context


def frame_ids(frames: Tensor | None, tokens: int, mask: BlockCausal, device: torch.device) -> Tensor:
    """Frame ids [B or 1, tokens / frame_tokens]; without ids the tokens are the video from its first frame on."""
    if frames is not None:
        return frames
    return torch.arange(mask.first_frame, mask.first_frame + tokens // mask.frame_tokens, device=device)[None]


def visibility(call: AttentionInputs, mask: BlockCausal) -> Tensor:
    """bool [B, Fq, Fk], or [B, Fq, Fc + Fk] with context keys first."""
    q, context = call.q, call.context
    q_frames = frame_ids(call.q_frames, q.shape[1], mask, q.device)
    kv_frames = frame_ids(call.kv_frames, call.k.shape[1], mask, q.device)
    if context is None:
        return mask.visible(q_frames, kv_frames, q.shape[0])
    return visible_with_context(mask, q_frames, kv_frames, context.frames, q.shape[0])


@own_arithmetic
def attention(call: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The oracle: all scores, in float32 or wider; and their logsumexp. A query that sees no key gives 0 and -inf."""
    q, keys, values, mask, context = call.q, call.k, call.v, call.mask, call.context
    wide = torch.promote_types(q.dtype, torch.float32)
    if context is not None:
        keys, values = torch.cat([context.k, keys], 1), torch.cat([context.v, values], 1)
    visible = None
    if mask is not None:
        visible = visibility(call, mask)
        visible = visible.repeat_interleave(mask.frame_tokens, 1).repeat_interleave(mask.frame_tokens, 2)
        used = visible.any(1)[:, :, None, None]  # a slot that no query sees may hold anything, NaN too
        keys, values = torch.where(used, keys, 0), torch.where(used, values, 0)
    if call.kv_counts is not None:
        used = (call.kv_counts > 0)[:, :, None, None]
        keys, values = torch.where(used, keys, 0), torch.where(used, values, 0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys.to(wide)) * call.softmax_scale
    if call.kv_counts is not None:
        counts = call.kv_counts.to(wide)[:, None, None, :]
        scores = torch.where(counts > 0, scores + counts.clamp(min=torch.finfo(wide).tiny).log(), float("-inf"))
    if visible is not None:
        scores = torch.where(visible[:, None], scores, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - torch.where(lse.isfinite(), lse, 0)[..., None])
    out = torch.einsum("bhqk,bkhd->bqhd", probs, values.to(wide)).to(q.dtype).contiguous()
    return out, lse
