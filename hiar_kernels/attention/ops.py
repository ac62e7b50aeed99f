"""``hiar::attention``, the Triton kernels, and ``hiar::attention_eager``, any implementation under torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import triton_loader
from ..common.torch_library import OPS, define, wide_dtype
from . import dispatch, reference
from .inputs import AttentionInputs

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? context_k, Tensor? context_v, Tensor? q_frames, Tensor? kv_frames, "
    "Tensor? context_frames, Tensor? kv_counts, int[] rule, int[] windows, "
)
_DIFFERENTIABLE = (0, 1, 2, 3, 4)


def _reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """CPU fallback. A CUDA tensor arrives here only before the kernels are loaded: load them, or raise."""
    q = arguments[0]
    if q.is_cuda:
        triton_loader.load("attention", q)
        return OPS.attention(*arguments)
    return reference.attention(AttentionInputs.from_schema(*arguments))


def _fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty((b, h, t), dtype=wide_dtype(q))


def _eager(*arguments: Any) -> tuple[Tensor, Tensor]:
    *schema, impl, num_splits, return_lse = arguments
    call = AttentionInputs.from_schema(*schema)
    out, lse = dispatch.run(call, impl, num_splits or None, return_lse=return_lse)
    return out, call.q.new_empty(0, dtype=wide_dtype(call.q)) if lse is None else lse


def _fake_eager(q: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = _fake(q)
    return out, lse if options[-1] else lse.new_empty(0)


define(
    __package__,
    "attention",
    _TENSORS + "float scale",
    2,
    _reference,
    _fake,
    differentiable=_DIFFERENTIABLE,
    saves_outputs=True,
)
# num_splits 0: the choice of impl="auto". The backward runs the forward again, since libraries save what they need.
define(
    __package__, "attention_eager", _TENSORS + "float? scale, str impl, int num_splits, bool return_lse", 2, _eager,
    _fake_eager, differentiable=_DIFFERENTIABLE,
)  # fmt: skip
