# mypy: allow-incomplete-defs
"""ring_advance in Triton: one program of one warp for a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compile import Case
from .._triton import register


@triton.jit(do_not_specialize=["count", "columns", "first_frame", "sink"])
def _ring_advance_fwd_kernel(
    position_ptr, frames_ptr, slots_ptr, ring_ptr, advance_ptr, capacities_ptr, stride_p, stride_f, stride_s, stride_r,
    stride_a, stride_c, count, columns, first_frame, sink,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position_ptr += row * stride_p
    position = tl.load(position_ptr)
    size = tl.load(capacities_ptr + row * stride_c)
    i = tl.arange(0, BLOCK_F)
    live = i < count
    g = position + i
    stays = (g < sink) & (g < size)
    slot = tl.where(stays, g, sink + (g - sink) % tl.maximum(size - sink, 1))
    frame = first_frame + g
    tl.store(frames_ptr + row * stride_f + i, frame, mask=live)
    tl.store(slots_ptr + row * stride_s + i, slot, mask=live)
    tl.store(ring_ptr + row * stride_r + slot, frame, mask=live & (slot < columns))  # never into other memory
    tl.store(position_ptr, position + tl.load(advance_ptr + row * stride_a))


def launch(
    position: Tensor,
    frames: Tensor,
    slots: Tensor,
    ring_frames: Tensor,
    advance: Tensor,
    capacities: Tensor,
    first_frame: int,
    sink_frames: int,
) -> None:
    """hiar::ring_advance."""
    rows, count = frames.shape
    if rows:
        with torch.cuda.device_of(position):
            _ring_advance_fwd_kernel[(rows,)](
                position, frames, slots, ring_frames, advance, capacities, position.stride(0), frames.stride(0),
                slots.stride(0), ring_frames.stride(0), advance.stride(0), capacities.stride(0), count,
                ring_frames.shape[1], first_frame, sink_frames, BLOCK_F=triton.next_power_of_2(max(count, 1)),
                num_warps=1,  # all of a row's lanes read the position before one of them moves it
            )  # fmt: skip


register("ring_advance", launch)


def compile_cases(arch: int) -> list[Case]:
    """Blocks of 3 frames, on every architecture alike."""
    names = _ring_advance_fwd_kernel.arg_names
    signature = {name: "*i32" if name.endswith("_ptr") else "i32" for name in names if name != "BLOCK_F"}
    pointers = tuple(name for name in signature if name.endswith("_ptr"))
    return [Case("blocks of 3", _ring_advance_fwd_kernel, signature, {"BLOCK_F": 4}, pointers, num_warps=1)]
