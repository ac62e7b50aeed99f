"""ring_advance, Triton and CUDA C++ alike, against the reference: exactly the same integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hiar_kernels import EMPTY, ring_advance

pytestmark = pytest.mark.interpreter


def rings(rows: int, count: int, columns: int, device: torch.device) -> list[Tensor]:
    """frames, slots and ring_frames: views of rows that lie apart, full of what a visit must overwrite or leave."""
    return [
        torch.full((2 * rows, width + 3), fill, dtype=torch.int32, device=device)[::2, 1 : width + 1]
        for width, fill in ((count, 2**31 - 1), (count, 2**31 - 1), (columns, EMPTY))
    ]


def assert_same(
    kernel: str,
    device: torch.device,
    position: list[int],
    capacities: list[int],
    *,
    count: int,
    columns: int,
    visits: int = 1,
    advance: int | None = None,
    **options: int,
) -> list[list[int]]:
    """Visits by the kernel and by the reference leave the same state; the slots of the last."""
    results = []
    for impl in (kernel, "reference"):
        spread = torch.tensor([position, [-9] * len(position)], dtype=torch.int32, device=device).T.contiguous()
        at, found = spread[:, 0], rings(len(position), count, columns, device)
        step = torch.full_like(at, count if advance is None else advance)
        sizes = torch.tensor(capacities, dtype=torch.int32, device=device)
        for _ in range(visits):
            ring_advance(at, *found, advance=step, capacities=sizes, impl=impl, **options)
        assert (spread[:, 1] == -9).all()
        results.append([at, *found, *(x._base for x in found)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return results[0][2].tolist()


@pytest.mark.parametrize("sink", range(4))
def test_every_small_ring(sink, kernel, device):
    """Rows of all sizes at all positions up to the third time around, in one launch."""
    for count in (1, 2, 3):
        sizes = range(sink + count, 9)
        rows = [(position, size) for size in sizes for position in range(3 * size)]
        position, capacities = map(list, zip(*rows))
        slots = assert_same(
            kernel, device, position, capacities, count=count, columns=9, first_frame=7, sink_frames=sink
        )
        for (g, size), found in zip(rows, slots):
            assert found == [h if h < sink else sink + (h - sink) % (size - sink) for h in range(g, g + count)]


def test_many_visits(kernel, device):
    options = {"count": 3, "columns": 9, "first_frame": 100, "sink_frames": 2}
    assert_same(kernel, device, [0, 3, 30, 8, 5], [5, 9, 7, 6, 5], visits=8, **options)
    assert_same(kernel, device, [0, 3, 30, 8, 5], [5, 9, 7, 6, 5], visits=3, advance=0, **options)


def test_long_visits(kernel, device):
    """More frames than a warp has lanes; a ring of one row."""
    assert_same(kernel, device, [61], [100], count=77, columns=100, visits=3)


def test_far_on(kernel, device):
    far = 2**30
    slots = assert_same(kernel, device, [far], [7], count=3, columns=7, first_frame=far - 3, sink_frames=2)
    assert slots == [[2 + (far + i - 2) % 5 for i in range(3)]]


def test_sinks_alone_and_nothing_at_all(kernel, device):
    assert assert_same(kernel, device, [1], [3], count=2, columns=3, sink_frames=7) == [[1, 2]]
    assert_same(kernel, device, [4], [3], count=0, columns=3, advance=3)
    assert_same(kernel, device, [], [], count=2, columns=3)


def test_never_into_other_memory(kernel, device):
    """A ring said to be larger than it is: what does not fit is not written."""
    found = rings(1, 3, 4, device)
    numbers = [torch.tensor([n], dtype=torch.int32, device=device) for n in (2, 3, 6)]
    ring_advance(numbers[0], *found, advance=numbers[1], capacities=numbers[2], impl=kernel)
    assert found[1].tolist() == [[2, 3, 4]] and found[2].tolist() == [[EMPTY, EMPTY, 2, 3]]
    assert (found[2]._base[:, 5:] == EMPTY).all() and (found[2]._base[1] == EMPTY).all()


def test_one_launch_serves_every_visit(kernel, device):
    """Captured once on a GPU, then replayed: nothing comes from the host."""
    state = [torch.tensor([0, 4], dtype=torch.int32, device=device), *rings(2, 2, 5, device)]
    again = [x.clone() for x in state]
    fixed = {
        "advance": torch.tensor([2, 2], dtype=torch.int32, device=device),
        "capacities": torch.tensor([4, 5], dtype=torch.int32, device=device),
        "sink_frames": 1,
    }
    visits = 6
    if device.type == "cuda":
        ring_advance(*[x.clone() for x in state], impl=kernel, **fixed)  # loads the kernel
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ring_advance(*state, impl=kernel, **fixed)
        for _ in range(visits):
            graph.replay()
    else:
        for _ in range(visits):
            ring_advance(*state, impl=kernel, **fixed)
    for _ in range(visits):
        ring_advance(*again, impl="reference", **fixed)
    assert all(torch.equal(a, b) for a, b in zip(state, again))
    assert state[0].tolist() == [12, 16]


def test_opcheck(kernel, device):
    state = [torch.tensor([0, 4], dtype=torch.int32, device=device), *rings(2, 2, 5, device)]
    fixed = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([2, 2], [4, 5])]
    ring_advance(*state, advance=fixed[0], capacities=fixed[1], impl=kernel)  # loads the kernel
    op = torch.ops.hiar.ring_advance_cuda if kernel == "cuda" else torch.ops.hiar.ring_advance
    torch.library.opcheck(op.default, (*state, *fixed, 3, 1))
