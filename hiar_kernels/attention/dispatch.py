"""Choose the implementation of an attention call and run it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import triton_loader
from ..common.dispatch import choose, require, require_autograd, resolve
from ..common.torch_library import OPS
from . import gluon, library, reference, selection
from .inputs import AttentionInputs
from .layout import AttentionLayout, attention_layout
from .schedule import AttentionSchedule, check_schedule

IMPLS = ("reference", *library.LIBRARIES, *selection.OWN)


def attend(
    call: AttentionInputs,
    impl: str,
    num_splits: int | None,
    layout: AttentionLayout | None,
    schedule: AttentionSchedule | None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(output, logsumexp if asked for) of the public functions."""
    call.validate()
    if layout is not None:
        call.validate_layout(layout)
    check_schedule("attention", schedule)
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"attention: num_splits must be at least 1, got {num_splits}")
    if torch.compiler.is_compiling():
        return _traced(call, impl, num_splits, return_lse)
    return run(call, impl, num_splits, layout, schedule, return_lse)


def run(
    call: AttentionInputs,
    impl: str,
    num_splits: int | None = None,
    layout: AttentionLayout | None = None,
    schedule: AttentionSchedule | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`attend` for a checked call, outside of torch.compile."""
    q, mask = call.q, call.mask
    automatic = impl == "auto"
    choice = selection.choose(call, layout, return_lse)
    impl = choose("attention", impl, IMPLS, auto=choice.impl)
    if num_splits is None:
        num_splits = choice.num_splits if automatic and impl == choice.impl else 1
    if impl == "gluon":
        gluon.require_fits(call)
        return gluon.attend(call, schedule)
    if impl == "triton":
        triton_loader.load("attention", q)
        require_autograd("attention", impl, *call.differentiable)
        return OPS.attention(*call.as_schema())
    if impl == "reference":
        if automatic and q.is_cuda and choice.impl == "reference":
            selection.warn_of_scores(call, choice)
        out, lse = reference.attention(call)
        return out, lse if return_lse else None
    problem = library.unavailable(impl, q.device)
    if problem is not None:
        raise ValueError(f"attention: impl={impl!r} cannot run: {problem}")
    if impl != "sdpa" and q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"attention: impl={impl!r} takes bfloat16 and float16, got {q.dtype}")
    if layout is None and mask is not None:
        layout = attention_layout(
            mask,
            reference.frame_ids(call.q_frames, q.shape[1], mask, q.device),
            reference.frame_ids(call.kv_frames, call.k.shape[1], mask, q.device),
            None if call.context is None else call.context.frames,
            rows=q.shape[0],
        )
    return library.attend(impl, call, layout, num_splits, return_lse)


def _traced(call: AttentionInputs, impl: str, num_splits: int | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The same under torch.compile: one op, and inside of it the implementation that was chosen.

    A library reads frame ids on the host and a choice by measurement asks the device, which the op hides from the
    tracer. "auto" is Triton on CUDA where it can run; its op saves what the backward needs.
    """
    triton = call.q.is_cuda and selection.triton_takes(call.q)
    impl = resolve("attention", impl, IMPLS, auto="triton" if triton else "auto")
    require(impl != "gluon", "attention: impl='gluon' is not for torch.compile; use 'auto' or 'triton' there")
    if impl in library.LIBRARIES and return_lse and call.needs_grad:
        raise ValueError(library.no_gradient_of_lse(impl))
    if impl == "triton":
        triton_loader.load("attention", call.q)
        return OPS.attention(*call.as_schema())
    *tensors, _ = call.as_schema()
    out, lse = OPS.attention_eager(*tensors, call.scale, impl, num_splits or 0, return_lse)
    return out, lse if return_lse else None
