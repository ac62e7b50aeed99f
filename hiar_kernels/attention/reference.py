"""Attention, eager: the dense oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import own_arithmetic
from .mask import BlockCausal, KVContext, visible_with_context


def frame_ids(frames: Tensor | None, tokens: int, mask: BlockCausal, device: torch.device) -> Tensor:
    """Frame ids [B or 1, tokens / frame_tokens]; without ids the tokens are the video from its first frame on."""
    if frames is not None:
        return frames
    return torch.arange(mask.first_frame, mask.first_frame + tokens // mask.frame_tokens, device=device)[None]


def visibility(
    q: Tensor,
    k: Tensor,
    mask: BlockCausal,
    q_frames: Tensor | None,
    kv_frames: Tensor | None,
    context: KVContext | None,
) -> Tensor:
    """bool [B, Fq, Fk], or [B, Fq, Fc + Fk] with context keys first."""
    qf = frame_ids(q_frames, q.shape[1], mask, q.device)
    kf = frame_ids(kv_frames, k.shape[1], mask, q.device)
    if context is None:
        return mask.visible(qf, kf, q.shape[0])
    return visible_with_context(mask, qf, kf, context.frames, q.shape[0])


@own_arithmetic
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: BlockCausal | None = None,
    q_frames: Tensor | None = None,
    kv_frames: Tensor | None = None,
    context: KVContext | None = None,
    kv_counts: Tensor | None = None,
    return_lse: bool = False,
    scale: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The oracle: all scores, in float32 or wider. A query that sees no key gives 0 and logsumexp -inf."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (k, v) if context is None else (torch.cat([context.k, k], 1), torch.cat([context.v, v], 1))
    seen = None
    if mask is not None:
        seen = visibility(q, k, mask, q_frames, kv_frames, context)
        seen = seen.repeat_interleave(mask.frame_tokens, 1).repeat_interleave(mask.frame_tokens, 2)
        held = seen.any(1)[:, :, None, None]  # an unseen slot may hold anything, NaN too
        keys, values = torch.where(held, keys, 0), torch.where(held, values, 0)
    if kv_counts is not None:
        held = (kv_counts > 0)[:, :, None, None]
        keys, values = torch.where(held, keys, 0), torch.where(held, values, 0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys.to(wide)) * scale
    if kv_counts is not None:
        counts = kv_counts.to(wide)[:, None, None, :]
        scores = torch.where(counts > 0, scores + counts.clamp(min=torch.finfo(wide).tiny).log(), float("-inf"))
    if seen is not None:
        scores = torch.where(seen[:, None], scores, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - torch.where(lse.isfinite(), lse, 0)[..., None])
    out = torch.einsum("bhqk,bkhd->bqhd", probs, values.to(wide)).to(q.dtype).contiguous()
    return (out, lse) if return_lse else out
