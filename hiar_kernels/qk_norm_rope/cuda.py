"""qk_norm_rope_append in CUDA C++ (csrc/qk_norm_rope_append.cu): a block for a token, k and v into the ring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _cuda
from ._launch import check_rings, checked, turns_of


def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    frames: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    height: int,
    width: int,
    eps: float,
    theta: float,
    cells: Sequence[int] | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Launcher of ``hiar::qk_norm_rope_append_cuda``."""
    op = "qk_norm_rope_append"
    qkv = checked(op, qkv, frames=frames, slots=slots, **({} if rows is None else {"rows": rows}))
    check_rings(op, k_cache, v_cache)
    b, t, c = qkv.shape
    head_dim = c // 3 // num_heads
    start, stop = cells or (0, height * width)
    q = torch.empty((b, t, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if q.numel():
        weights = q_weight.contiguous(), k_weight.contiguous()
        turns = turns_of(head_dim, theta, qkv.device)
        torch.ops.hiar_cuda.qk_norm_rope_append(
            qkv, *weights, _ids(frames), _ids(slots if slots.dim() == 3 else slots[None]),
            None if rows is None else _ids(rows), turns, q, k_cache, v_cache, stop - start, start, width, eps,
        )  # fmt: skip
    return q


def _ids(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.int32, torch.int64) else x.long()


_cuda.register("qk_norm_rope_append_cuda", qk_norm_rope_append)
