"""Public ring_advance."""

from __future__ import annotations

from torch import Tensor

from ..common import cuda_loader, pointwise, triton_loader
from ..common.dispatch import choose
from ..common.torch_library import OPS
from . import ops, reference  # noqa: F401  (registers the op)
from .inputs import RingState

IMPLS = ("reference", "triton", "cuda")


def ring_advance(
    position: Tensor,
    frames: Tensor,
    slots: Tensor,
    ring_frames: Tensor,
    *,
    advance: Tensor,
    capacities: Tensor,
    first_frame: int = 0,
    sink_frames: int = 0,
    impl: str = "auto",
) -> None:
    """Write the frame ids and ring slots of every row's next task, record them in the rings, and advance.

    A row is one ring (a step's, of one video). All tensors are int32 on one device and nothing is read on the host, so
    a captured graph that begins with this call needs no new arguments from task to task.

    With g = position[r] + i and size = capacities[r], before position moves::

        frames[r, i] = first_frame + g
        slots[r, i] = g                                               if g < sink_frames and g < size
                      sink_frames + (g - sink_frames) % (size - sink_frames)        otherwise
        ring_frames[r, slots[r, i]] = frames[r, i]
        position[r] += advance[r]

    Args:
        position: [R], written: first frame of the next task, counted from the video's first; 0 up to 2^30.
        frames, slots: [R, F], written. Their last dimension is dense, rows may be strided.
        ring_frames: [R, C], written: which frame each slot holds; as dense as they, C at least the largest capacity.
        advance: [R]: 0 if the next task has the same frames again (after a denoise task), else the finished frames.
        capacities: [R]: frame slots of each ring, enough for the frames of a task beside the sinks.
        first_frame: id of the video's first frame. sink_frames: first frames, which keep their slots for good.
        impl: "auto" | "reference" | "triton" or "cuda" (one launch, no allocation).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the implementation cannot take them.
    """
    state = RingState(position, frames, slots, ring_frames, advance, capacities, first_frame, sink_frames)
    state.validate()
    kernel = "triton" if position.is_cuda and pointwise.TRITON_INSTALLED else "reference"
    auto = "cuda" if cuda_loader.automatic(position) else kernel
    impl = choose("ring_advance", impl, IMPLS, auto=auto)
    if impl == "reference":
        reference.ring_advance(state)
    elif impl == "cuda":
        cuda_loader.load("ring_advance", position)
        OPS.ring_advance_cuda(*state.as_schema())
    else:
        triton_loader.load("ring_advance", position)
        OPS.ring_advance(*state.as_schema())
