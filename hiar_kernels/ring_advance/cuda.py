"""ring_advance in CUDA C++ (csrc/ring_advance.cu): one launch, nothing allocated."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda


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
    """hiar::ring_advance_cuda."""
    torch.ops.hiar_cuda.ring_advance(
        position, frames, slots, ring_frames, advance, capacities, first_frame, sink_frames
    )


_cuda.register("ring_advance_cuda", launch)
