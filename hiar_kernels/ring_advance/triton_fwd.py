# mypy: allow-incomplete-defs
"""ring_advance in Triton: one program of one warp for a row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..common.aot import Case
from ..common.triton_loader import FUSED, register
from .inputs import RingState


@triton.jit(do_not_specialize=["count", "columns", "first_frame", "sink"])
def _ring_advance_fwd_kernel(
    position_ptr, frames_ptr, slots_ptr, ring_ptr, advance_ptr, capacities_ptr, stride_p, stride_f, stride_s, stride_r,
    stride_a, stride_c, count, columns, first_frame, sink,
    BLOCK_F: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position_ptr += row * stride_p
    position = tl.load(position_ptr)
    size = tl.load(capacities_ptr + row * stride_c)
    i = tl.arange(0, BLOCK_F)
    mask = i < count
    g = position + i
    stays = (g < sink) & (g < size)
    slot = tl.where(stays, g, sink + (g - sink) % tl.maximum(size - sink, 1))
    frame = first_frame + g
    tl.store(frames_ptr + row * stride_f + i, frame, mask=mask)
    tl.store(slots_ptr + row * stride_s + i, slot, mask=mask)
    tl.store(ring_ptr + row * stride_r + slot, frame, mask=mask & (slot < columns))  # never out of bounds
    tl.store(position_ptr, position + tl.load(advance_ptr + row * stride_a))


def launch(*arguments: Any) -> None:
    """hiar::ring_advance."""
    state = RingState(*arguments)
    rows, count = state.frames.shape
    tensors = state.as_schema()[:6]
    if rows:
        with torch.cuda.device_of(state.position):
            _ring_advance_fwd_kernel[(rows,)](
                *tensors, *(x.stride(0) for x in tensors), count, state.ring_frames.shape[1], state.first_frame,
                state.sink_frames, BLOCK_F=triton.next_power_of_2(max(count, 1)),
                **FUSED,
                num_warps=1,  # all of a row's lanes read the position before one of them moves it
            )  # fmt: skip


register("ring_advance", launch)


def compile_cases(arch: int) -> list[Case]:
    """Blocks of 3 frames, on every architecture alike."""
    return [Case.of("blocks of 3", _ring_advance_fwd_kernel, {}, {"BLOCK_F": 4}, (), num_warps=1)]
