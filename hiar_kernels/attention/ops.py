"""``hiar::attention``: schema, fake and autograd of attention with its logsumexp."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define, wide_dtype
from . import reference
from .mask import BlockCausal, KVContext

_NONE = -1  # "no window" in the schema's int list


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    q_frames: Tensor | None,
    kv_frames: Tensor | None,
    context_frames: Tensor | None,
    kv_counts: Tensor | None,
    rule: list[int],
    windows: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    mask = None
    if rule:
        tokens, block, sink, first, first_block = rule
        mask = BlockCausal(tokens, block, tuple(None if w == _NONE else w for w in windows), sink, first, first_block)
    context = None
    if context_k is not None and context_v is not None and context_frames is not None:
        context = KVContext(context_k, context_v, context_frames)
    out = reference.attention(
        q,
        k,
        v,
        mask=mask,
        q_frames=q_frames,
        kv_frames=kv_frames,
        context=context,
        kv_counts=kv_counts,
        return_lse=True,
        scale=scale,
    )
    assert isinstance(out, tuple)
    return out


def _fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty((b, h, t), dtype=wide_dtype(q))


define(
    "attention",
    "Tensor q, Tensor k, Tensor v, Tensor? context_k, Tensor? context_v, Tensor? q_frames, Tensor? kv_frames, "
    "Tensor? context_frames, Tensor? kv_counts, int[] rule, int[] windows, float scale",
    2,
    _eager,
    _fake,
    differentiable=(0, 1, 2, 3, 4),
    saves_outputs=True,
)


def rule_of(mask: BlockCausal | None, rows: int) -> tuple[list[int], list[int]]:
    """A mask as the schema's integers: the rule, and the window of each batch item; both empty without a mask."""
    if mask is None:
        return [], []
    first_block = mask.frames_per_block if mask.first_block_frames is None else mask.first_block_frames
    rule = [mask.frame_tokens, mask.frames_per_block, mask.sink_frames, mask.first_frame, first_block]
    return rule, [_NONE if w is None else w for w in mask.windows(rows)]


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockCausal | None,
    q_frames: Tensor | None,
    kv_frames: Tensor | None,
    context: KVContext | None,
    kv_counts: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.hiar.attention`` with the arguments of the public function."""
    rule, windows = rule_of(mask, q.shape[0])
    ck, cv, cf = (None, None, None) if context is None else (context.k, context.v, context.frames)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result: tuple[Tensor, Tensor] = torch.ops.hiar.attention(
        q, k, v, ck, cv, q_frames, kv_frames, cf, kv_counts, rule, windows, scale
    )
    return result
