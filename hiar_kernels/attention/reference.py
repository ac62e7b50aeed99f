"""Attention, eager: the dense oracle and the CPU path through scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None = None) -> Tensor:
    """[B, T, H, D] through torch's fused attention; on a CPU in float32, where bfloat16 is the slower one."""
    dtype, device = q.dtype, q.device.type
    if device == "cpu" and dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, enabled=False):
            return _sdpa(q.float(), k.float(), v.float(), scale, None if bias is None else bias.float()).to(dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=scale
    )
    return out.transpose(1, 2)


class _Frames:
    """Tokens of chosen frames of x [B, T, H, D]: a view where they lie side by side, else one copy."""

    def __init__(self, x: Tensor, frame_tokens: int) -> None:
        self.x, self.tokens = x, frame_tokens
        # a slice's backward fills a whole zero tensor; the pieces of one split share a single concatenation
        self.pieces = x.split(frame_tokens, 1) if x.requires_grad and torch.is_grad_enabled() else None

    def __getitem__(self, frames: list[int]) -> list[Tensor]:
        if self.pieces is not None:
            return [self.pieces[f] for f in frames]
        runs: list[list[int]] = []
        for f in frames:
            if runs and runs[-1][1] == f:
                runs[-1][1] = f + 1
            else:
                runs.append([f, f + 1])
        return [self.x[:, a * self.tokens : b * self.tokens] for a, b in runs]


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: BlockCausal | None = None,
    q_frames: Tensor | None = None,
    kv_frames: Tensor | None = None,
    context: KVContext | None = None,
    kv_counts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same through torch's fused attention, only over the keys that are visible: no mask is ever materialised.

    Reads the frame ids on the host, so it suits the CPU, not a captured graph.
    """
    if mask is None:
        wide = torch.promote_types(q.dtype, torch.float32)  # round the logarithm: 509 is no bfloat16
        bias = None if kv_counts is None else kv_counts.to(wide).log().to(q.dtype)[:, None, None, :]
        return _sdpa(q, k, v, scale, bias).contiguous()
    seen = visibility(q, k, mask, q_frames, kv_frames, context)
    first, split = seen[0], 0 if context is None else context.frames.shape[1]
    if q.shape[0] > 1 and not bool((seen == first).all()):
        rows = []
        for b in range(q.shape[0]):  # rows at different steps see different slots
            row = slice(b, b + 1)
            ctx = None if context is None else KVContext(context.k[row], context.v[row], context.frames)
            rows.append(_visible_runs(q[row], k[row], v[row], ctx, seen[b].tolist(), split, mask.frame_tokens, scale))
        return torch.cat(rows)
    return _visible_runs(q, k, v, context, first.tolist(), split, mask.frame_tokens, scale)


def _visible_runs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: KVContext | None,
    seen: list[list[bool]],
    split: int,
    tokens: int,
    scale: float | None,
) -> Tensor:
    """One fused call for each run of query frames that see the same key frames."""
    queries, keys, values = _Frames(q, tokens), _Frames(k, tokens), _Frames(v, tokens)
    ctx = None if context is None else (_Frames(context.k, tokens), _Frames(context.v, tokens))
    outs, start = [], 0
    for stop in range(1, len(seen) + 1):
        if stop < len(seen) and seen[stop] == seen[start]:
            continue
        query = _join(queries[list(range(start, stop))])
        visible = [j for j, s in enumerate(seen[start]) if s]
        own, earlier = [j - split for j in visible if j >= split], [j for j in visible if j < split]
        parts = [keys[own], values[own]]
        if ctx is not None:
            parts = [ctx[0][earlier] + parts[0], ctx[1][earlier] + parts[1]]
        outs.append(_sdpa(query, _join(parts[0]), _join(parts[1]), scale) if visible else torch.zeros_like(query))
        start = stop
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0].contiguous()


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
