"""Public attention and attention_with_lse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import resolve
from . import gluon, library, ops, selection  # noqa: F401  (registers the ops)
from .dispatch import IMPLS, attend
from .inputs import AttentionInputs
from .layout import AttentionLayout
from .mask import BlockCausal, KVContext
from .schedule import AttentionSchedule


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
    layout: AttentionLayout | None = None,
    schedule: AttentionSchedule | None = None,
    scale: float | None = None,
    impl: str = "auto",
    num_splits: int | None = None,
) -> Tensor:
    """Softmax attention, bidirectional or block-causal by absolute frame ids.

    One rule (:class:`BlockCausal`) serves training, a ring cache in any slot order, two tasks fused in one row, and
    batches whose items are at different steps. Differentiable in q, k, v and the context's k, v.

    Args:
        q: [B, Tq, H, D]. k, v: [B, Tk, H, D], same dtype (float16, bfloat16, float32, float64) and device; any strides.
        mask: None: every query sees every key. :class:`BlockCausal`: the rule of HiAR (arXiv 2603.08703).
        q_frames: int32 [B or 1, Tq / frame_tokens], absolute frame ids; default: the video from ``mask.first_frame``.
        kv_frames: int32 [B or 1, Tk / frame_tokens], -1 where a slot is empty; default likewise.
        context: keys and values of earlier blocks (:class:`KVContext`). k, v then count only inside the query's block:
            teacher forcing, or training over constant caches.
        kv_counts: [B or 1, Tk], how often each key occurs: adds its logarithm to the key's score; 0 hides it. Without a
            mask only, and without a gradient. n equal padding keys are one key with count n.
        layout: what :func:`attention_layout` made of the same mask and ids. The libraries below then read nothing from
            the device; without it (and under torch.compile) they read the frame ids, and wait for the device.
        schedule: what :func:`attention_schedule` made of the same sizes, mask and ids, for ``impl="gluon"``, which
            makes one at each call without it. Others go by the ids.
        scale: of the scores; default 1 / sqrt(D).
        impl: "auto" (:func:`hiar_kernels.backends` tells what it takes) | "triton" (bfloat16, float16, float32; D 16,
            32, 64 or 128; last strides of 1; no host sync) | "gluon" (Hopper; bfloat16, float16; D 128; no context,
            counts or gradient; no host sync; not under torch.compile) | "reference" (all scores) | a library over the
            visible keys: "sdpa" (torch's own choice), "cudnn", "flash" (torch's), "flash-attn-2", "flash-attn-3",
            "flash-attn-4".
        num_splits: of a library: the keys as so many rows of one launch, merged, which may fill a chip better (keys
            that are not so many equal runs leave a rest, in a second call); default: 1, or what was measured. Without
            gradient only.

    Returns:
        [B, Tq, H, D] contiguous, dtype of q. What no query sees (an empty slot, a key with count 0) may hold anything,
        NaN too, and has gradient 0; a query without a visible key gives 0, with gradient 0.

    Raises:
        ValueError: shapes, dtypes, devices or ids do not fit, with actual and expected.

    Example:
        >>> q, k = torch.randn(1, 2 * 5, 2, 16), torch.randn(1, 6 * 5, 2, 16)  # 2 and 6 frames of 5 tokens
        >>> mask = BlockCausal(frame_tokens=5, frames_per_block=2, window_frames=4)
        >>> ids = {"q_frames": torch.tensor([[4, 5]]), "kv_frames": torch.tensor([[4, 5, -1, -1, 2, 3]])}  # a ring
        >>> attention(q, k, k, mask=mask, **ids).shape
        torch.Size([1, 10, 2, 16])
    """
    inputs = AttentionInputs(q, k, v, mask, q_frames, kv_frames, context, kv_counts, scale)
    return attend(inputs, impl, num_splits, layout, schedule)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: BlockCausal | None = None,
    q_frames: Tensor | None = None,
    kv_frames: Tensor | None = None,
    context: KVContext | None = None,
    kv_counts: Tensor | None = None,
    layout: AttentionLayout | None = None,
    schedule: AttentionSchedule | None = None,
    scale: float | None = None,
    impl: str = "auto",
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` and the natural logsumexp of the scaled scores, by which partial results merge exactly.

    Arguments and errors are those of :func:`attention`. Libraries give a logsumexp without gradient only, on CUDA of
    bfloat16 and float16; "triton" and "reference" are differentiable in both results.

    Returns:
        out [B, Tq, H, D], logsumexp [B, H, Tq] in float32 (float64 for float64); -inf for a query without a visible
        key.

    Example:
        >>> q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 6, 2, 8)
        >>> out, lse = attention_with_lse(q, k, k)
        >>> out.shape, lse.shape
        (torch.Size([1, 4, 2, 8]), torch.Size([1, 2, 4]))
    """
    inputs = AttentionInputs(q, k, v, mask, q_frames, kv_frames, context, kv_counts, scale)
    out, lse = attend(inputs, impl, num_splits, layout, schedule, return_lse=True)
    assert lse is not None
    return out, lse


def takes_layout(q: Tensor, mask: BlockCausal, impl: str = "auto") -> bool:
    """Whether ``impl`` goes by a layout for such queries, without gradient: through a library. If not, one launch by
    frame ids on the device serves every layout.
    """
    with torch.no_grad():
        choice = selection.choose(AttentionInputs(q, q, q, mask), AttentionLayout(mask.frame_tokens, ()))
    return resolve("attention", impl, IMPLS, auto=choice.impl) in library.LIBRARIES


def takes_schedule(q: Tensor, k: Tensor, mask: BlockCausal, impl: str = "auto") -> bool:
    """Whether ``impl`` runs the kernel that goes by an :class:`AttentionSchedule` for such queries and keys, without
    gradient: one made ahead then serves every layer. ValueError where that kernel was named and cannot run.
    """
    inputs = AttentionInputs(q, k, k, mask)
    with torch.no_grad():
        if resolve("attention", impl, IMPLS, auto=selection.choose(inputs).impl) != "gluon":
            return False
        gluon.require_fits(inputs)
    return True
