"""cross_attention, eager."""

from __future__ import annotations

from torch import Tensor

from ..attention import reference as attention
from ..rms_norm import reference as norm


def cross_attention(q: Tensor, q_weight: Tensor, k: Tensor, v: Tensor, kv_counts: Tensor | None, eps: float) -> Tensor:
    """softmax(rms_norm(q) k^T / sqrt(D) + log counts) v."""
    normed = norm.rms_norm(q, q_weight, eps).unflatten(-1, k.shape[2:])
    k, v = (x.expand(len(q), -1, -1, -1) for x in (k, v))
    out = attention.attention(normed, k, v, kv_counts=kv_counts)
    assert isinstance(out, Tensor)
    return out
