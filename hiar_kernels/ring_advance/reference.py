"""ring_advance, eager."""

from __future__ import annotations

import torch
from torch import Tensor


def ring_advance(
    position: Tensor,
    frames: Tensor,
    slots: Tensor,
    ring_frames: Tensor,
    advance: Tensor,
    capacities: Tensor,
    first_frame: int,
    sink_frames: int,
) -> None:
    """Integer tensor operations throughout: nothing is read on the host, so a graph may capture it."""
    g = position[:, None] + torch.arange(frames.shape[1], dtype=torch.int32, device=position.device)
    size = capacities[:, None]
    round_trip = (size - sink_frames).clamp(min=1)  # a ring of sinks alone has none, and divides by nothing
    stays = (g < sink_frames) & (g < size)
    slots.copy_(torch.where(stays, g, sink_frames + (g - sink_frames) % round_trip))
    frames.copy_(g + first_frame)
    ring_frames.scatter_(1, slots.long(), frames)
    position.add_(advance)
