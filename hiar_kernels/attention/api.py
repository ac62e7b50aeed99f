"""Public attention: validation and choice of the implementation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _triton
from .._dispatch import check_floats, check_tensor, choose, require
from . import gluon, library, ops, reference, table
from .layout import AttentionLayout, attention_layout
from .mask import BlockCausal, KVContext
from .schedule import AttentionSchedule

IMPLS = ("reference", *library.LIBRARIES, *table.OWN)


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
    kv_log_counts: Tensor | None = None,
    layout: AttentionLayout | None = None,
    schedule: AttentionSchedule | None = None,
    return_lse: bool = False,
    scale: float | None = None,
    impl: str = "auto",
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, bidirectional or block-causal by absolute frame ids.

    One rule (:class:`BlockCausal`) serves training, a ring cache in any slot order, two visits fused in one row, and
    batches whose rows are at different steps. Differentiable in q, k, v and the context's k, v.

    Args:
        q: [B, Tq, H, D]. k, v: [B, Tk, H, D], same dtype (float16, bfloat16, float32, float64) and device; any strides.
        mask: None: every query sees every key. :class:`BlockCausal`: the rule of HiAR (arXiv 2603.08703).
        q_frames: int32 [B or 1, Tq / frame_tokens], absolute frame ids; default: the video from ``mask.first_frame``.
        kv_frames: int32 [B or 1, Tk / frame_tokens], -1 where a slot is empty; default likewise.
        context: keys and values of earlier blocks (:class:`KVContext`). k, v then count only inside the query's block:
            teacher forcing, or training over constant caches.
        kv_counts: [B or 1, Tk], how often each key occurs: adds its logarithm to the key's score; 0 hides it, and
            nothing behind a hidden key matters, NaN included: its gradient is 0. Without a mask only. n equal padding
            keys are one key with count n.
        kv_log_counts: the logarithm of ``kv_counts`` in the dtype of q, same shape, where it is at hand: a library
            adds it to the scores, and need not make it anew in every layer, nor look for hidden keys: who gives it
            says that these hold finite numbers and that some key of every row counts.
        layout: what :func:`attention_layout` made of the same mask and ids. The libraries below then read nothing from
            the device; without it they read the frame ids, and the device is waited for.
        schedule: what :func:`attention_schedule` made of the same sizes, mask and ids, for ``impl="gluon"``, which
            makes one at each call without it. Others go by the ids.
        return_lse: also return the natural logsumexp of the scaled scores, [B, H, Tq], float32 (float64 for float64).
        scale: of the scores; default 1 / sqrt(D).
        impl: "auto" (:func:`hiar_kernels.backends` tells what it takes) | "triton" (bfloat16, float16, float32; D 16,
            32, 64 or 128; last strides of 1; no host sync) | "gluon" (Hopper; bfloat16, float16; D 128; no context,
            counts or gradient; no host sync) | "reference" (all scores) | a library over the visible keys: "sdpa"
            (torch's own choice), "cudnn", "flash" (torch's), "flash-attn-2", "flash-attn-3", "flash-attn-4". With a
            logsumexp libraries have no gradient.
        num_splits: of a library: the keys as so many rows of one launch, merged, which may fill a chip better (keys
            that are not so many equal runs leave a rest, in a second call); default: 1, or what was measured. Without
            gradient only.

    Returns:
        [B, Tq, H, D] contiguous, dtype of q; with ``return_lse`` also the logsumexp. A query without a visible key
        gives 0 (logsumexp -inf), with gradient 0. What no query sees may hold anything, NaN too.

    Raises:
        ValueError: shapes, dtypes, devices or ids do not fit, with actual and expected.

    Example:
        >>> q, k = torch.randn(1, 2 * 5, 2, 16), torch.randn(1, 6 * 5, 2, 16)  # 2 and 6 frames of 5 tokens
        >>> mask = BlockCausal(frame_tokens=5, frames_per_block=2, window_frames=4)
        >>> ids = {"q_frames": torch.tensor([[4, 5]]), "kv_frames": torch.tensor([[4, 5, -1, -1, 2, 3]])}  # a ring
        >>> attention(q, k, k, mask=mask, **ids).shape
        torch.Size([1, 10, 2, 16])
    """
    _validate(q, k, v, mask, q_frames, kv_frames, context, kv_counts)
    if kv_log_counts is not None:
        if kv_counts is None:
            found = f"{kv_log_counts.dtype} {list(kv_log_counts.shape)}"
            raise ValueError(f"attention: kv_log_counts must be None without kv_counts, got {found}")
        if (kv_log_counts.dtype, kv_log_counts.shape) != (q.dtype, kv_counts.shape):
            raise ValueError(
                f"attention: kv_log_counts must be {q.dtype} {list(kv_counts.shape)} like kv_counts, "
                f"got {kv_log_counts.dtype} {list(kv_log_counts.shape)}"
            )
    if scale is not None and (isinstance(scale, str) or not -math.inf < scale < math.inf):
        raise ValueError(f"attention: scale must be a finite number, or None for 1 / sqrt(D), got {scale!r}")
    if layout is not None:
        _validate_layout(q, k, mask, context, layout)
    asked = impl
    chosen = table.Choice("sdpa", 1, "traced")
    if not torch.compiler.is_compiling():
        chosen = table.choose(q, k, v, mask, context, kv_counts, layout, return_lse, _trains(q, k, v, context))
    impl = choose("attention", impl, IMPLS, auto=chosen.impl)
    if num_splits is None:
        num_splits = chosen.num_splits if asked == "auto" and impl == chosen.impl else 1
    if num_splits < 1:
        raise ValueError(f"attention: num_splits must be at least 1, got {num_splits}")
    if impl == "gluon":
        traced = torch.compiler.is_compiling()
        require(not traced, "attention: impl='gluon' is not for torch.compile; use 'auto' or 'triton' there")
        gluon.require_fits(q, k, v, mask, context, kv_counts, _trains(q, k, v, context))
        out, lse = gluon.attend(q, k, v, mask, q_frames, kv_frames, schedule, scale)
        return (out, lse) if return_lse else out
    if impl == "triton":
        _triton.load("attention", q)
    elif impl in library.LIBRARIES:
        lacking = library.unavailable(impl, q.device)
        if lacking is not None:
            raise ValueError(f"attention: impl={impl!r} cannot run: {lacking}")
        if impl != "sdpa" and q.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"attention: impl={impl!r} takes bfloat16 and float16, got {q.dtype}")
    # under torch.compile too: the eager paths read frame ids on the host, which the op hides from the tracer
    if impl == "triton" or torch.compiler.is_compiling():
        out, lse = ops.call(q, k, v, mask, q_frames, kv_frames, context, kv_counts, scale)
        return (out, lse) if return_lse else out
    if impl in library.LIBRARIES:
        if layout is None and mask is not None:
            layout = attention_layout(
                mask,
                reference.frame_ids(q_frames, q.shape[1], mask, q.device),
                reference.frame_ids(kv_frames, k.shape[1], mask, q.device),
                None if context is None else context.frames,
                rows=q.shape[0],
            )
        counts = (kv_counts, kv_log_counts)
        result = library.attend(impl, q, k, v, layout, context, counts, scale, num_splits, return_lse)
        return result if result[1] is not None else result[0]  # type: ignore[return-value]
    return reference.attention(
        q,
        k,
        v,
        mask=mask,
        q_frames=q_frames,
        kv_frames=kv_frames,
        context=context,
        kv_counts=kv_counts,
        return_lse=return_lse,
        scale=scale,
    )


def takes_layout(q: Tensor, mask: BlockCausal) -> bool:
    """Whether ``impl="auto"`` would go by a layout for such queries, without gradient: through a library. If not, one
    launch by frame ids on the device serves every layout.
    """
    layout = AttentionLayout(mask.frame_tokens, ())
    chosen = table.choose(q, q, q, mask, None, None, layout, False, False).impl
    return choose("attention", "auto", IMPLS, auto=chosen) in library.LIBRARIES


def takes_schedule(q: Tensor, k: Tensor, mask: BlockCausal) -> bool:
    """Whether ``impl="auto"`` would run the kernel that goes by an :class:`AttentionSchedule` for such queries and
    keys, without gradient: one made ahead then serves every layer.
    """
    chosen = table.choose(q, k, k, mask, None, None, None, False, False).impl
    return choose("attention", "auto", IMPLS, auto=chosen) == "gluon"


def _trains(q: Tensor, k: Tensor, v: Tensor, context: KVContext | None) -> bool:
    given = (q, k, v) if context is None else (q, k, v, context.k, context.v)
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


def _validate_layout(
    q: Tensor, k: Tensor, mask: BlockCausal | None, context: KVContext | None, layout: AttentionLayout
) -> None:
    """A layout of other lengths would read past the keys."""
    require(mask is not None, "attention: layout needs the BlockCausal mask that it was made of, got mask=None")
    assert mask is not None
    tokens = mask.frame_tokens
    if layout.frame_tokens != tokens or len(layout.rows) not in (1, q.shape[0]):
        raise ValueError(
            f"attention: layout is of {layout.frame_tokens} frame_tokens and {len(layout.rows)} rows, the mask of "
            f"{tokens} and q of {q.shape[0]}"
        )
    slots = {"queries": q.shape[1] // tokens, "own keys": k.shape[1] // tokens}
    slots["context keys"] = 0 if context is None else context.k.shape[1] // tokens
    for groups in layout.rows:
        reach = {
            "queries": groups[-1].queries[1] if groups else 0,
            "own keys": max((g.own[-1][1] for g in groups if g.own), default=0),
            "context keys": max((g.context[-1][1] for g in groups if g.context), default=0),
        }
        for name, last in reach.items():
            if last > slots[name] or (name == "queries" and last != slots[name]):
                raise ValueError(f"attention: layout has {last} slots of {name}, there are {slots[name]}")


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockCausal | None,
    q_frames: Tensor | None,
    kv_frames: Tensor | None,
    context: KVContext | None,
    kv_counts: Tensor | None,
) -> None:
    if mask is not None and not isinstance(mask, BlockCausal):
        found = f"a tensor {list(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
        legal = "None or BlockCausal(frame_tokens, frames_per_block, ...): who sees whom goes by frame ids"
        raise ValueError(f"attention: mask must be {legal}; got {found}")
    check_floats("attention", q=q)
    check_tensor("attention", "k", k)
    check_tensor("attention", "v", v)
    optional = {"q_frames": q_frames, "kv_frames": kv_frames, "kv_counts": kv_counts}
    for name, given in optional.items():
        if given is not None:
            check_tensor("attention", name, given)
    if q.dim() != 4:
        raise ValueError(f"attention: q must be [B, Tq, H, D], got {list(q.shape)}")
    b, _, h, d = q.shape
    pairs = [("k", k, k), ("v", v, k)]
    if context is not None:
        require(mask is not None, "attention: context needs a BlockCausal mask, got mask=None")
        require(context.scales is None, "attention: context.scales (8-bit keys) are not supported; expected None")
        pairs += [("context.k", context.k, context.k), ("context.v", context.v, context.k)]
    for name, x, like in pairs:
        length = like.shape[1] if like.dim() == 4 else "Tk"
        if x.dim() != 4 or x.shape != (b, length, h, d):
            raise ValueError(f"attention: {name} must be [{b}, {length}, {h}, {d}], got {list(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"attention: {name} must be {q.dtype} like q, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"attention: {name} must be on {q.device} like q, got {x.device}")
    if mask is None:
        require(q_frames is None and kv_frames is None, "attention: frame ids need a BlockCausal mask, got mask=None")
        if kv_counts is not None and (
            kv_counts.dim() != 2 or kv_counts.shape[0] not in (1, b) or kv_counts.shape[1] != k.shape[1]
        ):
            raise ValueError(f"attention: kv_counts must be [{b} or 1, {k.shape[1]}], got {list(kv_counts.shape)}")
        return
    require(kv_counts is None, "attention: kv_counts needs mask=None")
    mask.windows(b)
    tokens = mask.frame_tokens
    lengths = [("q", q, q_frames, "q_frames"), ("k", k, kv_frames, "kv_frames")]
    if context is not None:
        lengths.append(("context.k", context.k, context.frames, "context.frames"))
    for name, x, frames, ids in lengths:
        if x.shape[1] % tokens:
            raise ValueError(f"attention: {name} has {x.shape[1]} tokens, no multiple of frame_tokens {tokens}")
        if frames is None:
            continue
        slots = x.shape[1] // tokens
        if frames.dim() != 2 or frames.shape[0] not in (1, b) or frames.shape[1] != slots:
            raise ValueError(f"attention: {ids} must be [{b} or 1, {slots}], got {list(frames.shape)}")
        if frames.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"attention: {ids} must be int32 or int64, got {frames.dtype}")
        if frames.device != q.device:
            raise ValueError(f"attention: {ids} must be on {q.device} like q, got {frames.device}")
