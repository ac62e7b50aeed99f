"""ring_advance, eager."""

from __future__ import annotations

import torch

from .inputs import RingState


def ring_advance(state: RingState) -> None:
    """Integer tensor operations throughout: nothing is read on the host, so a graph may capture it."""
    position, frames, sink = state.position, state.frames, state.sink_frames
    g = position[:, None] + torch.arange(frames.shape[1], dtype=torch.int32, device=position.device)
    size = state.capacities[:, None]
    round_trip = (size - sink).clamp(min=1)  # a ring of sinks alone has none, and divides by nothing
    stays = (g < sink) & (g < size)
    state.slots.copy_(torch.where(stays, g, sink + (g - sink) % round_trip))
    frames.copy_(g + state.first_frame)
    state.ring_frames.scatter_(1, state.slots.long(), frames)
    position.add_(state.advance)
