"""The arguments of one call of ring_advance as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.dispatch import check_tensor

LARGEST = 2**30  # frames and sinks in int32, with room for a sum of two


@dataclass(frozen=True)
class RingState:
    """The arguments of ``hiar::ring_advance`` in the order of its schema; the first four are written."""

    position: Tensor
    frames: Tensor
    slots: Tensor
    ring_frames: Tensor
    advance: Tensor
    capacities: Tensor
    first_frame: int
    sink_frames: int

    def as_schema(self) -> tuple[Any, ...]:
        tensors = (self.position, self.frames, self.slots, self.ring_frames, self.advance, self.capacities)
        return (*tensors, self.first_frame, self.sink_frames)

    def validate(self) -> None:
        """Raise ValueError, in one line, if shapes, dtypes or devices are wrong."""
        op = "ring_advance"
        for name in ("position", "frames", "slots", "ring_frames", "advance", "capacities"):
            check_tensor(op, name, getattr(self, name))
        if self.frames.dim() != 2:
            raise ValueError(f"{op}: frames must be [R, F], got {list(self.frames.shape)}")
        rows, count = self.frames.shape
        names = ("position", "slots", "advance", "capacities")
        for name, shape in zip(names, ((rows,), (rows, count), (rows,), (rows,)), strict=True):
            x = getattr(self, name)
            if tuple(x.shape) != shape:
                raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(x.shape)}")
        ring = self.ring_frames
        if ring.dim() != 2 or ring.shape[0] != rows or ring.shape[1] < count:
            raise ValueError(f"{op}: ring_frames must be [{rows}, {count} or more], got {list(ring.shape)}")
        for name in ("frames", "ring_frames", *names):
            x = getattr(self, name)
            if x.dtype != torch.int32:
                raise ValueError(f"{op}: {name} must be torch.int32, got {x.dtype}")
            if x.device != self.position.device:
                raise ValueError(f"{op}: {name} must be on {self.position.device} like position, got {x.device}")
        for name in ("frames", "slots", "ring_frames"):
            x = getattr(self, name)
            if x.shape[1] >= 2 and x.stride(1) != 1:
                raise ValueError(f"{op}: the last dimension of {name} must be dense, got stride {x.stride(1)}")
        for name in ("first_frame", "sink_frames"):
            n = getattr(self, name)
            if not (0 <= n <= LARGEST):
                raise ValueError(f"{op}: {name} must be 0 to {LARGEST}, got {n}")
