"""``hiar::qk_norm_rope`` (functional, differentiable) and ``hiar::qk_norm_rope_append`` (mutates the ring)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import define
from . import reference


def _one(qkv: Tensor, num_heads: int) -> Tensor:
    b, t, c = qkv.shape
    return torch.empty((b, t, num_heads, c // 3 // num_heads), dtype=qkv.dtype, device=qkv.device)


def _fake(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    frames: Tensor,
    num_heads: int,
    height: int,
    width: int,
    eps: float,
    theta: float,
    cells: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    return _one(qkv, num_heads), _one(qkv, num_heads)


def _fake_append(
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
    return _one(qkv, num_heads)


_SHARED = "int num_heads, int height, int width, float eps, float theta"
_CELLS = "int[]? cells=None"
define(
    "qk_norm_rope",
    f"Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor frames, {_SHARED}, {_CELLS}",
    2,
    reference.qk_norm_rope,
    _fake,
    (0, 1, 2),
)
for _name in ("qk_norm_rope_append", "qk_norm_rope_append_cuda"):  # an op has one kernel for a device: Triton's, CUDA's
    define(
        _name,
        "Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor frames, Tensor slots, Tensor(a!) k_cache, "
        f"Tensor(b!) v_cache, {_SHARED}, {_CELLS}, Tensor? rows=None",
        1,
        reference.qk_norm_rope_append,
        _fake_append,
        (),
        mutates=True,
    )
