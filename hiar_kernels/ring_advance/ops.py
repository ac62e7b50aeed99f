"""``hiar::ring_advance``: schema and fake. It returns nothing and has no gradient."""

from __future__ import annotations

from typing import Any

from ..common.torch_library import define
from . import reference
from .inputs import RingState


def _eager(*arguments: Any) -> None:
    reference.ring_advance(RingState(*arguments))


def _fake(*arguments: Any) -> None:
    return None


_SCHEMA = (
    "Tensor(a!) position, Tensor(b!) frames, Tensor(c!) slots, Tensor(d!) ring_frames, Tensor advance, "
    "Tensor capacities, int first_frame, int sink_frames"
)
for _name in ("ring_advance", "ring_advance_cuda"):  # an op has one kernel for a device: Triton's, CUDA's
    define(__package__, _name, _SCHEMA, 0, _eager, _fake, (), mutates=True)
