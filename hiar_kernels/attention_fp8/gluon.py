"""Host side of ``impl="gluon"`` of attention_fp8, the Hopper kernel. Imports triton only when it runs."""

from __future__ import annotations

from torch import Tensor

from ..attention.gluon import attention_schedule, unavailable
from ..attention.schedule import AttentionSchedule
from ..common import triton_loader
from ..common.shapes import HEAD_DIM
from .inputs import Float8Inputs


def problem(call: Float8Inputs) -> str | None:
    """Why the kernel cannot run a valid call; None if it can."""
    return unavailable(call.q.device) or unfit(call)


def unfit(call: Float8Inputs) -> str | None:
    """Why the kernel does not support a call on any device; None if it does."""
    q, k, v, tokens = call.q, call.k, call.v, call.mask.frame_tokens
    if not call.eight_bits or q.shape[3] != HEAD_DIM:
        return f"it takes q in 8 bits, beside q_scales, of head_dim {HEAD_DIM}, got {q.dtype} of {q.shape[3]}"
    for name, x in (("q", q), ("k", k)):
        if x.numel() == 0:
            return f"it takes at least one token, got {name} {list(x.shape)}"
        if x.stride(3) != 1 or x.stride(2) != HEAD_DIM or x.data_ptr() % 16 or any(s % 16 for s in x.stride()[:2]):
            return f"it takes heads side by side, at whole 16 bytes, got {name} with strides {x.stride()}"
    b, (_, slots, h, d, width) = q.shape[0], v.shape
    if v.stride()[1:] != (h * d * width, d * width, width, 1) or v.data_ptr() % 16 or v.stride(0) % 16:
        return f"it takes v with dense slots, at whole 16 bytes, got strides {v.stride()}"
    if b > 1 and (k.stride(0) % (tokens * k.stride(1)) or not (q.stride(0) and k.stride(0) and v.stride(0))):
        return f"it takes batch items of their own, whole frame slots apart, got k with strides {k.stride()}"
    for name, scales in (("k_scales", call.k_scales), ("v_scales", call.v_scales)):
        if scales.stride()[1:] != (h, 1) and slots * h > 1:
            return f"it takes {name} with dense slots, got strides {scales.stride()}"
    return None


def attend(call: Float8Inputs, schedule: AttentionSchedule | None) -> Tensor:
    """:func:`hiar_kernels.attention_fp8` of a call without a :func:`problem`."""
    q, k = call.q, call.k
    triton_loader.load("attention_fp8", q)
    from . import gluon_fwd

    if schedule is None:
        shape = (*q.shape[:3], k.shape[1])
        ids = (call.mask, call.q_frames, call.kv_frames)
        schedule = attention_schedule(shape, *ids, device=q.device, one_slot=True)
    return gluon_fwd.launch(call, schedule)[0]
