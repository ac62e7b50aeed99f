"""Host side of ``impl="gluon"`` of attention_fp8, the Hopper kernel. Imports triton only when it runs."""

from __future__ import annotations

from torch import Tensor

from ..attention.gluon import attention_schedule, unavailable
from ..attention.schedule import AttentionSchedule
from ..common import triton_loader
from ..common.shapes import HEAD_DIM, steps
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
        item, token, *inner = steps(x)
        if inner != [HEAD_DIM, 1] or x.data_ptr() % 16 or item % 16 or token % 16 or not token:
            return f"it takes heads side by side, at whole 16 bytes, got {name} with strides {x.stride()}"
    _, _, h, d, width = v.shape
    if steps(v)[1:] != (h * d * width, d * width, width, 1) or v.data_ptr() % 16 or steps(v)[0] % 16:
        return f"it takes v with dense slots, at whole 16 bytes, got strides {v.stride()}"
    item, token, *_ = steps(k)
    if item % (tokens * token) or not (steps(q)[0] and item and steps(v)[0]):
        return f"it takes batch items of their own, whole frame slots apart, got k with strides {k.stride()}"
    for name, scales in (("k_scales", call.k_scales), ("v_scales", call.v_scales)):
        if steps(scales)[1:] != (h, 1):
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
