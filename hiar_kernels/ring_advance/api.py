"""Public ring_advance."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda, _triton
from .._dispatch import check_tensor, choose
from .._pointwise import TRITON_INSTALLED
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "triton", "cuda")
_LARGEST = 2**30  # frames and sinks in int32, with room for a sum of two


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
    """Write the frame ids and ring slots of every row's next visit, note them in the rings, and move on.

    A row is one ring (a step's, of one video). All tensors are int32 on one device and nothing is read on the host, so
    a captured graph that begins with this call needs no new arguments from visit to visit.

    With g = position[r] + i and size = capacities[r], before position moves::

        frames[r, i] = first_frame + g
        slots[r, i] = g                                               if g < sink_frames and g < size
                      sink_frames + (g - sink_frames) % (size - sink_frames)        otherwise
        ring_frames[r, slots[r, i]] = frames[r, i]
        position[r] += advance[r]

    Args:
        position: [R], written: first frame of the next visit, counted from the video's first; 0 up to 2^30.
        frames, slots: [R, F], written. Their last dimension is dense, rows may be strided.
        ring_frames: [R, C], written: which frame each slot holds; as dense as they, C at least the largest capacity.
        advance: [R]: 0 where the row visits the same frames again (a denoise visit), else the frames it is done with.
        capacities: [R]: frame slots of each ring, enough for the frames of a visit beside the sinks.
        first_frame: id of the video's first frame. sink_frames: first frames, which keep their slots for good.
        impl: "auto" | "reference" | "triton" or "cuda" (one launch, no allocation).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the implementation cannot take them.
    """
    op = "ring_advance"
    for name, x in (
        ("position", position), ("frames", frames), ("slots", slots), ("ring_frames", ring_frames),
        ("advance", advance), ("capacities", capacities),
    ):  # fmt: skip
        check_tensor(op, name, x)
    if frames.dim() != 2:
        raise ValueError(f"{op}: frames must be [R, F], got {list(frames.shape)}")
    rows, count = frames.shape
    shapes = {"position": (position, (rows,)), "slots": (slots, (rows, count))}
    shapes |= {"advance": (advance, (rows,)), "capacities": (capacities, (rows,))}
    for name, (x, shape) in shapes.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(x.shape)}")
    fits = ring_frames.dim() == 2 and ring_frames.shape[0] == rows and ring_frames.shape[1] >= count
    if not fits:
        raise ValueError(f"{op}: ring_frames must be [{rows}, {count} or more], got {list(ring_frames.shape)}")
    for name, x in (("frames", frames), ("ring_frames", ring_frames), *((n, x) for n, (x, _) in shapes.items())):
        if x.dtype != torch.int32:
            raise ValueError(f"{op}: {name} must be torch.int32, got {x.dtype}")
        if x.device != position.device:
            raise ValueError(f"{op}: {name} must be on {position.device} like position, got {x.device}")
    for name, x in (("frames", frames), ("slots", slots), ("ring_frames", ring_frames)):
        ok = x.shape[1] < 2 or x.stride(1) == 1
        if not ok:
            raise ValueError(f"{op}: the last dimension of {name} must be dense, got stride {x.stride(1)}")
    for name, n in (("first_frame", first_frame), ("sink_frames", sink_frames)):
        if not (0 <= n <= _LARGEST):
            raise ValueError(f"{op}: {name} must be 0 to {_LARGEST}, got {n}")
    arguments = (position, frames, slots, ring_frames, advance, capacities, first_frame, sink_frames)
    kernel = "triton" if position.is_cuda and TRITON_INSTALLED else "reference"
    impl = choose(op, impl, IMPLS, auto="cuda" if _cuda.automatic(position) else kernel)
    if impl == "reference":
        reference.ring_advance(*arguments)
    elif impl == "cuda":
        _cuda.load(op, position)
        torch.ops.hiar.ring_advance_cuda(*arguments)
    else:
        _triton.load(op, position)
        torch.ops.hiar.ring_advance(*arguments)
