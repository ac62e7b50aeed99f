"""Public cross_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import choose, require
from .._pointwise import automatic, prepare
from ..attention import attention
from ..rms_norm import rms_norm
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "composed", "triton")
MOST_KEYS = 128  # one tile holds the scores of all keys
HEAD_DIMS = (16, 32, 64, 128)


def cross_attention(
    q: Tensor,
    q_weight: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_counts: Tensor | None = None,
    kv_log_counts: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """RMS norm of the queries over all heads (Wan 2.1, "qk norm"), then attention to the few keys of a prompt.

    One pass over the queries where :func:`hiar_kernels.rms_norm` and :func:`hiar_kernels.attention` take two.

    >>> q, k = torch.randn(1, 4680, 1536), torch.randn(1, 16, 12, 128)
    >>> cross_attention(q, torch.ones(1536), k, k).shape
    torch.Size([1, 4680, 12, 128])

    Args:
        q: [B, T, H D], as projected, not normalised. q_weight: [H D], any floating dtype.
        k, v: [B or 1, L, H, D], dtype of q, normalised already.
        kv_counts: [B or 1, L], how often each key occurs (its logarithm is added to the score); 0 hides it. None: once.
        kv_log_counts: as for ``attention``: the logarithms of ``kv_counts``, for who has them already.
        eps: added to the mean square.
        impl: "auto" | "reference" | "composed" (rms_norm and attention, each by its own "auto") | "triton" (bfloat16,
            float16, float32; L at most 128, D 16, 32, 64 or 128). Auto takes triton on CUDA where no gradient is
            needed and it can, else composed.

    Returns:
        [B, T, H, D] contiguous, dtype of q; the normalised queries are rounded to it. 0 where no key is visible.

    Raises:
        ValueError: shapes or dtypes do not fit, or impl="triton" cannot take them, with actual and expected.
    """
    _validate(q, q_weight, k, v, kv_counts)
    batch = q.shape[0]
    if batch > 1 and k.shape[0] == 1 and (kv_counts is None or kv_counts.shape[0] == 1):
        # one prompt for all: one sequence of queries
        one = q.flatten(0, 1)[None]
        joined = cross_attention(
            one, q_weight, k, v, kv_counts=kv_counts, kv_log_counts=kv_log_counts, eps=eps, impl=impl
        )
        return joined.unflatten(1, (batch, -1))[0]
    fits = k.shape[1] <= MOST_KEYS and k.shape[3] in HEAD_DIMS and k.shape[1] > 0
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, q_weight, k, v))
    auto = automatic(q, q_weight, k, v)
    if impl == "auto" and (trains or not fits):
        impl = "composed"  # whose parts go by what is preferred
    impl = choose("cross_attention", impl, IMPLS, auto="composed" if auto == "reference" else auto)
    if impl == "composed":
        normed = rms_norm(q, q_weight, eps=eps).unflatten(-1, k.shape[2:])
        k, v = (x.expand(len(q), -1, -1, -1) for x in (k, v))
        out = attention(normed, k, v, kv_counts=kv_counts, kv_log_counts=kv_log_counts)
        assert isinstance(out, Tensor)
        return out
    if impl == "triton":
        prepare("cross_attention", q=q, q_weight=q_weight, k=k, v=v)
        sizes = ", ".join(map(str, HEAD_DIMS))
        legal = f"takes 1 to {MOST_KEYS} keys of head_dim {sizes}"
        require(fits, f"cross_attention: impl='triton' {legal}, got {k.shape[1]} of {k.shape[3]}")
        found: Tensor = torch.ops.hiar.cross_attention(q, q_weight, k, v, kv_counts, eps)
        return found
    return reference.cross_attention(q, q_weight, k, v, kv_counts, eps)


def _validate(q: Tensor, q_weight: Tensor, k: Tensor, v: Tensor, kv_counts: Tensor | None) -> None:
    require(q.dim() == 3 and k.dim() == 4, f"cross_attention: q must be [B, T, C] and k [B or 1, L, H, D], got "
            f"{list(q.shape)} and {list(k.shape)}")  # fmt: skip
    b, _, width = q.shape
    ok = k.shape[0] in (1, b) and k.shape[2] * k.shape[3] == width
    require(ok, f"cross_attention: k must be [{b} or 1, L, H, D] with H D = {width}, got {list(k.shape)}")
    require(v.shape == k.shape, f"cross_attention: v must be {list(k.shape)} like k, got {list(v.shape)}")
    ok = tuple(q_weight.shape) == (width,)
    require(ok, f"cross_attention: q_weight must be [{width}], got {list(q_weight.shape)}")
    for name, x in (("k", k), ("v", v)):
        require(x.dtype == q.dtype, f"cross_attention: {name} must be {q.dtype} like q, got {x.dtype}")
        require(x.device == q.device, f"cross_attention: {name} must be on {q.device} like q, got {x.device}")
    if kv_counts is not None:
        ok = kv_counts.dim() == 2 and kv_counts.shape[0] in (1, b) and kv_counts.shape[1] == k.shape[1]
        wanted = f"[{b} or 1, {k.shape[1]}]"
        require(ok, f"cross_attention: kv_counts must be {wanted}, got {list(kv_counts.shape)}")
