"""``hiar::ring_advance``: schema and fake. It returns nothing and has no gradient."""

from __future__ import annotations

from torch import Tensor

from .._library import define
from . import reference


def _fake(
    position: Tensor,
    frames: Tensor,
    slots: Tensor,
    ring_frames: Tensor,
    advance: Tensor,
    capacities: Tensor,
    first_frame: int,
    sink_frames: int,
) -> None:
    return None


for _name in ("ring_advance", "ring_advance_cuda"):  # an op has one kernel for a device: Triton's, CUDA's
    define(
        _name,
        "Tensor(a!) position, Tensor(b!) frames, Tensor(c!) slots, Tensor(d!) ring_frames, Tensor advance, "
        "Tensor capacities, int first_frame, int sink_frames",
        0,
        reference.ring_advance,
        _fake,
        (),
        mutates=True,
    )
