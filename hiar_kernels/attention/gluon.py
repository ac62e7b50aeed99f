"""Host side of ``impl="gluon"``, the Hopper kernel, and its requirements. Imports triton only when it runs."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ..common import triton_loader
from ..common.dispatch import require
from ..common.shapes import HEAD_DIM, steps
from .inputs import AttentionInputs
from .mask import BlockCausal
from .schedule import AttentionSchedule

_MODULE = "triton.experimental.gluon.language.nvidia.hopper"


def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device; None if it can."""
    if device.type != "cuda":
        return f"it needs a Hopper GPU (sm_90), got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"it needs a Hopper GPU (sm_90), got sm_{major}{minor}"
    return None if _installed() else f"it needs {_MODULE} (Triton 3.6 or newer), which is not installed"


@functools.cache
def _installed() -> bool:
    try:
        return importlib.util.find_spec(_MODULE) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def unfit(call: AttentionInputs) -> str | None:
    """Why the kernel does not support a call; None if it does."""
    q, k, v, mask = call.q, call.k, call.v, call.mask
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[3] != HEAD_DIM:
        return f"it takes bfloat16 and float16 of head_dim {HEAD_DIM}, got {q.dtype} of {q.shape[3]}"
    if call.context is not None or call.kv_counts is not None:
        return f"it takes no {'context' if call.context is not None else 'kv_counts'}"
    slot = k.shape[1] if mask is None else mask.frame_tokens
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.numel() == 0:
            return f"it takes at least one token, got {name} {list(x.shape)}"
        item, token, *inner = steps(x)
        if inner != [HEAD_DIM, 1] or x.data_ptr() % 16 or item % 8 or token % 8 or not token:
            return f"it takes heads side by side, at whole 16 bytes, got {name} with strides {x.stride()}"
        in_slots = x.shape[0] == 1 or x.shape[1] == slot or item % (slot * token) == 0
        if name != "q" and not in_slots:
            return f"it takes batch items whole frame slots apart, got {name} with strides {x.stride()}"
        if not item:
            return f"it takes batch items of their own, got {name} shared by a stride of 0"
    if k.shape[0] > 1 and steps(k) != steps(v):
        return f"it takes k and v laid out alike, got strides {k.stride()} and {v.stride()}"
    return None


def attention_schedule(
    shape: tuple[int, int, int, int],
    mask: BlockCausal | None = None,
    q_frames: Tensor | None = None,
    kv_frames: Tensor | None = None,
    *,
    device: torch.device | str,
    ctas: int | None = None,
    one_slot: bool = False,
) -> AttentionSchedule:
    """What :func:`hiar_kernels.attention` with ``impl="gluon"`` does for such a call; it launches two small kernels.

    Args:
        shape: (B, Tq, H, Tk). mask, q_frames, kv_frames: as for ``attention``; frame ids int32 on the device.
        ctas: programs of the grid; default: one for each SM of the device.
        one_slot: for :func:`hiar_kernels.attention_fp8`, whose key blocks do not leave their frame slot.

    Raises:
        ValueError: lengths are no multiples of the mask's frame_tokens, or another device than CUDA.

    Example (on a GPU)::

        schedule = attention_schedule((1, 4680, 12, 32760), mask, q_frames, kv_frames, device="cuda")
        for q, k, v in layers:
            out = attention(q, k, v, mask=mask, q_frames=q_frames, kv_frames=kv_frames, schedule=schedule, impl="gluon")
    """
    _, queries, _, keys = shape
    tokens = keys if mask is None else mask.frame_tokens
    for name, n in (("Tq", queries), ("Tk", keys)):
        divides = mask is None or n % tokens == 0
        if not (n > 0 and divides):
            raise ValueError(f"attention_schedule: {name} must be a positive multiple of {tokens}, got {n}")
    if torch.device(device).type != "cuda" and not triton_loader.interpreting():
        raise ValueError(f"attention_schedule: serves impl='gluon', and {unavailable(torch.device(device))}")
    triton_loader.load("attention", torch.empty(0, device=device))
    from .triton_schedule import make

    return make(shape, mask, q_frames, kv_frames, torch.device(device), ctas, one_slot)


def attend(call: AttentionInputs, schedule: AttentionSchedule | None) -> tuple[Tensor, Tensor]:
    """(out, logsumexp) of :func:`hiar_kernels.attention`; no gradient."""
    q, k = call.q, call.k
    triton_loader.load("attention", q)
    from . import gluon_fwd

    if schedule is None:
        shape = (*q.shape[:3], k.shape[1])
        schedule = attention_schedule(shape, call.mask, call.q_frames, call.kv_frames, device=q.device)
    return gluon_fwd.launch(q, k, call.v, schedule, call.softmax_scale)


def require_fits(call: AttentionInputs) -> None:
    """Raise ValueError in one line for what ``impl="gluon"`` does not support."""
    problem = unavailable(call.q.device) or unfit(call)
    if problem is not None:
        raise ValueError(f"attention: impl='gluon' cannot run: {problem}")
    require(not call.needs_grad, "attention: impl='gluon' has no gradient; use 'triton', 'sdpa' or torch.no_grad()")
