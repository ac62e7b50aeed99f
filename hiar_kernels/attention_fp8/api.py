"""Public attention_fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.mask import BlockCausal
from ..attention.schedule import AttentionSchedule, check_schedule
from ..common import triton_loader
from ..common.dispatch import choose, require, require_no_gradient
from ..common.float8 import NO_GRADIENT
from ..common.pointwise import TRITON_INSTALLED
from ..common.torch_library import OPS
from . import gluon, ops, reference  # noqa: F401  (registers the op)
from .inputs import Float8Inputs, triton_problem

IMPLS = ("reference", "triton", "gluon")


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    *,
    mask: BlockCausal,
    q_frames: Tensor,
    kv_frames: Tensor,
    q_scales: Tensor | None = None,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
    schedule: AttentionSchedule | None = None,
    impl: str = "auto",
) -> Tensor:
    """:func:`attention` over the 8-bit ring that :func:`qk_norm_rope_append_fp8` writes, read as it lies.

    Without ``q_scales`` keys and values are as wide as q in the products; their scales apply to the scores and to the
    sums. With ``q_scales`` the products are of 8 bits: probabilities, at most 1, are rounded to e4m3 in blocks of 128
    keys from the start of each frame slot, relative to the highest score so far; sums are float32. No gradient.

    Args:
        q: [B, Tq, H, D], bfloat16, float16, float32 or float64; or float8_e4m3fn beside ``q_scales``.
        k: float8_e4m3fn [B, S P, H, D], S frame slots of P = ``mask.frame_tokens``.
        v: float8_e4m3fn [B, S, H, D, P16], keys of a channel side by side in the order of :func:`append_fp8`.
        k_scales, v_scales: float32 [B, S, H].
        mask, scale: as in :func:`attention`.
        q_frames: int32 or int64 [B or 1, Tq / P], absolute frame ids. kv_frames: [B or 1, S], -1 where a slot is empty.
        q_scales: float32 [B, Tq, H], one for each token and head (:func:`quantize_rows` gives them).
        out_dtype: of the result of 8-bit products; default bfloat16. Otherwise it is that of q.
        schedule: of :func:`attention_schedule` with ``one_slot=True``, for "gluon"; made anew in each call if None.
        impl: "auto" | "reference" (all scores) | "triton" (q bfloat16, float16 or 8 bits; D 16, 32, 64 or 128) |
            "gluon" (sm_90, 8-bit q, D 128; not measured yet, so never chosen by "auto").

    Returns:
        [B, Tq, H, D] contiguous. What no query sees (an empty slot) may hold anything, NaN too; a query without a
        visible key gives 0.

    Raises:
        ValueError: shapes, dtypes, devices or ids do not fit, with actual and expected.

    Example:
        >>> ring = torch.zeros(1, 4 * 16, 2, 16), torch.zeros(1, 4, 2, 16, 16)  # 4 slots of 16 tokens, 2 heads of 16
        >>> k, v = (x.to(torch.float8_e4m3fn) for x in ring)
        >>> q, scales, mask = torch.randn(1, 16, 2, 16), torch.ones(1, 4, 2), BlockCausal(16, frames_per_block=1)
        >>> ids = {"q_frames": torch.tensor([[2]]), "kv_frames": torch.tensor([[2, -1, 0, 1]])}
        >>> attention_fp8(q, k, v, scales, scales, mask=mask, **ids).shape
        torch.Size([1, 16, 2, 16])
    """
    inputs = Float8Inputs(q, k, v, k_scales, v_scales, q_scales, q_frames, kv_frames, mask, scale, out_dtype)
    inputs.validate()
    check_schedule("attention_fp8", schedule)
    tensors = (q, k_scales, v_scales) if q_scales is None else (k_scales, v_scales, q_scales)
    require_no_gradient("attention_fp8", NO_GRADIENT, *tensors)
    automatic = "triton" if q.is_cuda and TRITON_INSTALLED and not triton_problem(inputs) else "reference"
    impl = choose("attention_fp8", impl, IMPLS, auto=automatic)
    if impl == "reference":
        return reference.attention_fp8(inputs)
    if impl == "gluon":
        require(not torch.compiler.is_compiling(), "attention_fp8: impl='gluon' is not for torch.compile; use 'triton'")
        lacking = gluon.problem(inputs)
        if lacking is not None:
            raise ValueError(f"attention_fp8: impl='gluon' cannot run: {lacking}")
        return gluon.attend(inputs, schedule)
    triton_loader.load("attention_fp8", q)
    problem = triton_problem(inputs)
    if problem:
        raise ValueError(f"attention_fp8: impl='triton' {problem}")
    out: Tensor = OPS.attention_fp8(*inputs.as_schema())
    return out
