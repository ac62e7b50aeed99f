"""ring_advance: the slots of every visit, against plain integers and against the rings of the model."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from hiar_kernels import EMPTY, ring_advance
from hiar_model.config import WanConfig
from hiar_model.models.kv_cache import RingCache

pytestmark = pytest.mark.cpu


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def state(rows: int, count: int, columns: int) -> dict[str, Tensor]:
    """Results full of what they must not keep; the ring a view of rows that lie apart."""
    ring = torch.full((rows, columns + 3), EMPTY, dtype=torch.int32)[:, :columns]
    frames, slots = torch.full((2, rows, count), 2**31 - 1, dtype=torch.int32)
    return {"frames": frames, "slots": slots, "ring_frames": ring}


def slot_of(g: int, size: int, sink: int) -> int:
    return g if g < sink and g < size else sink + (g - sink) % (size - sink)


@pytest.mark.parametrize("sink", range(4))
@pytest.mark.parametrize("size", range(1, 8))
def test_every_small_ring(size, sink):
    """All positions from the first to the third time around, for all visits that fit beside the sinks."""
    for count in range(1, size - sink + 1):
        for position in range(3 * size):
            found, at = state(1, count, size + 1), ints(position)
            ring_advance(at, **found, advance=ints(count), capacities=ints(size), first_frame=5, sink_frames=sink)
            wanted = [slot_of(position + i, size, sink) for i in range(count)]
            ids = [5 + position + i for i in range(count)]
            assert found["slots"].tolist() == [wanted] and found["frames"].tolist() == [ids]
            ring = dict(zip(wanted, ids, strict=True))
            assert found["ring_frames"].tolist() == [[ring.get(slot, EMPTY) for slot in range(size + 1)]]
            assert at.tolist() == [position + count]


def test_rings_of_the_model():
    """Rows of different capacities at different positions, over many visits: as RingCache has it on the host."""
    config = WanConfig.from_name("toy")
    capacities, sink, first = (5, 9, 7), 2, 100
    rings = RingCache(config, capacities, 1, 1, sink)
    found, position = state(3, 3, 9), ints(0, 3, 30)
    steps = ints(3, 0, 3)
    for visit in range(8):
        at = position.tolist()
        assert at == [3 * visit, 3, 30 + 3 * visit]
        sizes = ints(*capacities)
        ring_advance(position, **found, advance=steps, capacities=sizes, first_frame=first, sink_frames=sink)
        for row, start in enumerate(at):
            frames = range(start, start + 3)
            assert found["slots"][row].tolist() == rings.slots(row, frames)
            assert found["frames"][row].tolist() == [first + f for f in frames]
            held = found["ring_frames"][row, found["slots"][row].long()]
            assert torch.equal(held, found["frames"][row])


def test_a_ring_of_sinks_alone():
    found, position = state(1, 2, 3), ints(1)
    ring_advance(position, **found, advance=ints(2), capacities=ints(3), sink_frames=7)
    assert found["slots"].tolist() == [[1, 2]] and found["ring_frames"].tolist() == [[EMPTY, 1, 2]]


def test_a_billion_frames_on():
    found, position = state(1, 3, 7), ints(2**30)
    ring_advance(position, **found, advance=ints(3), capacities=ints(7), first_frame=2**30 - 3, sink_frames=2)
    assert found["slots"].tolist() == [[slot_of(2**30 + i, 7, 2) for i in range(3)]]
    assert found["frames"].tolist() == [[2**31 - 3, 2**31 - 2, 2**31 - 1]]


def test_no_rows_and_no_frames():
    ring_advance(ints(), **state(0, 2, 3), advance=ints(), capacities=ints())
    position = ints(4)
    ring_advance(position, **state(1, 0, 3), advance=ints(3), capacities=ints(3))
    assert position.tolist() == [7]


def test_compile_without_breaks():
    results = []
    for f in (ring_advance, torch.compile(ring_advance, fullgraph=True, backend="aot_eager")):
        found, position = state(2, 2, 5), ints(0, 9)
        for _ in range(3):
            f(position, **found, advance=ints(2, 2), capacities=ints(4, 5), sink_frames=1)
        results.append((position, found))
    torch.testing.assert_close(results[1], results[0])


TWO = torch.zeros(2, 2, dtype=torch.int32)
BAD: dict[str, tuple[dict[str, object], str]] = {
    "positions of other rows": ({"position": ints(0)}, "position must be [2], got [1]"),
    "frames in one dimension": ({"frames": ints(0, 0)}, "frames must be [R, F], got [2]"),
    "slots of other frames": ({"slots": TWO[:, :1]}, "slots must be [2, 2], got [2, 1]"),
    "a ring below a visit": ({"ring_frames": TWO[:, :1]}, "ring_frames must be [2, 2 or more], got [2, 1]"),
    "long capacities": ({"capacities": ints(4, 4).long()}, "capacities must be torch.int32, got torch.int64"),
    "another device": ({"advance": ints(0, 0).to("meta")}, "advance must be on cpu like position, got meta"),
    "frame ids apart": ({"frames": torch.cat([TWO, TWO], 1)[:, ::2]}, "of frames must be dense, got stride 2"),
    "negative sinks": ({"sink_frames": -1}, "sink_frames must be 0 to 1073741824, got -1"),
    "a video far on": ({"first_frame": 2**31}, "first_frame must be 0 to 1073741824, got 2147483648"),
    "another implementation": ({"impl": "sdpa"}, "has no implementation 'sdpa'; legal: auto, reference, triton, cuda"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(what):
    changes, message = BAD[what]
    good = {"position": ints(3, 3), "advance": ints(0, 0), "capacities": ints(3, 3), **state(2, 2, 3)}
    ring_advance(**good)
    with pytest.raises(ValueError, match=f"^ring_advance: .*{re.escape(message)}$"):
        ring_advance(**{**good, **changes})
