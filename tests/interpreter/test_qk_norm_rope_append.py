"""qk_norm_rope_append, Triton and CUDA C++ alike, against the reference in float64: the ring, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from budget import assert_within_budget
from refusals import refused
from torch import Tensor

from hiar_kernels import qk_norm_rope_append

from .test_qk_norm_rope_triton import DTYPES, MILLION, PAIRS, Shape, ids, remainder

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

RING = Shape(2, [[3, 4, MILLION], [0, 7, 2]], (2, 3), 2, 10)


def append(shape: Shape, tensors: list[Tensor], slots: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
    device = tensors[0].device
    frames, slots = ids(*shape.frames).to(device), slots.to(device)
    options = {"num_heads": shape.heads, "grid": shape.grid, "cells": shape.cells}
    return qk_norm_rope_append(*tensors, frames, slots, k, v, impl=impl, **options)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # [4, 36, 2, 10] of memory -> rows [2, 36, 2, 10] of a ring
    "every other row": lambda x: x[1::2],
    "heads outside": lambda x: x.view(4, 2, 36, 10).transpose(1, 2)[:2],
    "half of the channels": lambda x: x.view(2, 36, 2, 20)[..., 10:],
    "steps inside": lambda x: x.view(36, 4, 2, 10)[:, 1:3].transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("slots", [ids([4, 0, 2]), ids([4, 0, 2], [1, 5, 3], dtype=torch.int64)], ids=["shared", "own"])
def test_append_changes_only_the_named_slots(slots, dtype, layout, kernel, device):
    tensors = [x.to(dtype).to(device) for x in RING.inputs()]
    memory = [torch.full((4, 36, 2, 10), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    rings = [LAYOUTS[layout](x) for x in memory]
    q = append(RING, tensors, slots, *rings, kernel)
    wanted = RING.call(*tensors, impl="triton")
    torch.testing.assert_close(q, wanted[0])
    for ring, whole, new in zip(rings, memory, wanted[1:]):
        for row in range(2):
            for frame, slot in enumerate(slots[row % len(slots)].tolist()):
                written = ring[row, slot * 6 : slot * 6 + 6]
                torch.testing.assert_close(written, new[row, frame * 6 : frame * 6 + 6])
        assert whole.isnan().sum() == whole.numel() - new.numel()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_ring_that_wraps_many_times(dtype, kernel, device):
    """Blocks of 2 frames in a ring of 5: after 7 of them the slots hold the last frames, whichever visit came last."""
    shape = Shape(2, [[0, 1]], (1, 3), 2, 8)
    rings = {
        impl: [torch.full((2, 15, 2, 8), torch.nan, dtype=dtype, device=device) for _ in range(2)]
        for impl in (kernel, "reference")
    }
    for block in range(7):
        first = MILLION + 2 * block
        for visit in range(2):  # a cache visit lands in the slots of its denoise visit
            moved = Shape(2, [[first, first + 1]], (1, 3), 2, 8)
            tensors = [(x + visit).to(dtype).to(device) for x in shape.inputs()]
            slots = ids([first % 5, (first + 1) % 5])
            qs = [append(moved, tensors, slots, *ring, impl=impl) for impl, ring in rings.items()]
            torch.testing.assert_close(*qs)
    for a, b in zip(*rings.values()):
        torch.testing.assert_close(a, b)


RINGS = {  # the CUDA kernel holds 8 (float32: 4) neighbours in a pack, or pairs where these do not fit
    "pairs": RING,
    "cells": replace(RING, grid=(4, 5), cells=(7, 13)),
    "one pack a thread": Shape(1, [[MILLION + 3]], (1, 3), 12, 128),
    "two packs": Shape(1, [[20, MILLION]], (1, 1), 20, 128),
    "four packs": Shape(1, [[7]], (2, 2), 40, 128, cells=(1, 3)),
    "the widest, one head": Shape(1, [[MILLION]], (1, 1), 1, 8192),
    "the widest, in pairs": Shape(1, [[MILLION]], (1, 1), 4095, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RINGS)
def test_append_with_the_error_budget(name, dtype, kernel, device):
    shape = RINGS[name]
    tensors = [x.to(dtype) for x in shape.inputs()]
    exact = [x.double() for x in tensors]
    frames = len(shape.frames[0])
    size = (2, shape.batch, 3 * shape.tokens // frames, shape.heads, shape.head_dim)
    three = []
    for x, impl in (([x.to(device) for x in tensors], kernel), (tensors, "reference"), (exact, "reference")):
        k, v = torch.zeros(size, dtype=x[0].dtype, device=x[0].device)
        three.append([append(shape, x, ids([2, 0, 1][:frames]), k, v, impl).cpu(), k.cpu(), v.cpu()])
    for what, *found in zip("qkv", *three):
        assert_within_budget(*found, what)


def one_off(x: Tensor) -> Tensor:
    """The same numbers, one number further on in memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def wider(x: Tensor) -> Tensor:
    """The same numbers in rows that are one number longer."""
    return torch.cat([x, x[..., :1]], -1)[..., :-1]


@pytest.mark.parametrize("moved", [one_off, wider])
@pytest.mark.parametrize("which", range(5), ids=["qkv", "q_weight", "k_weight", "k_cache", "v_cache"])
def test_memory_where_packs_do_not_fit(which, moved, kernel, device):
    shape = Shape(2, [[MILLION]], (1, 3), 2, 16)
    results = []
    for odd in (False, True):
        tensors = [x.bfloat16().to(device) for x in (*shape.inputs(), *torch.zeros(2, 2, 6, 2, 16))]
        if odd:
            tensors[which] = moved(tensors[which])
        qkv, q_weight, k_weight, k, v = tensors
        results.append((append(shape, [qkv, q_weight, k_weight], ids([1]), k, v, kernel), k, v))
    torch.testing.assert_close(results[1], results[0])
    assert (results[0][1][:, :3] == 0).all() and (results[0][1][:, 3:] != 0).any()


@pytest.mark.parametrize("frame", [0, 1, MILLION + 3, 2**31 - 1, 2**36, -7])
def test_angles_are_exact_far_on(frame, kernel, device):
    """Pairs that are the number 1 become their turn; the angles of all three axes against exact ones."""
    qkv = torch.zeros(1, 12, 6 * PAIRS, device=device)
    qkv[..., : 4 * PAIRS : 2] = 1
    ones, (k, v) = torch.ones(2 * PAIRS, device=device), torch.zeros(2, 1, 12, 1, 2 * PAIRS, device=device)
    frames, slots = ids([frame], dtype=torch.int64).to(device), ids([0]).to(device)
    q = qk_norm_rope_append(
        qkv, ones, ones, frames, slots, k, v, num_heads=1, grid=(3, 4), eps=0.5, impl=kernel
    )  # mean square 1/2, eps 1/2: nothing to norm
    torch.testing.assert_close(q, k)
    found = q[0, :, 0].unflatten(-1, (PAIRS, 2)).cpu().double()
    for cell in range(12):
        angles = [Fraction(frame, 10**i) for i in range(4)]
        angles += [Fraction(place * 10000 ** (-i / 3)) for place in divmod(cell, 4) for i in range(3)]
        expected = torch.tensor([remainder(angle) for angle in angles], dtype=torch.float64)
        assert (found[cell] - expected).abs().max() <= 2e-7


@pytest.mark.parametrize("ring", DTYPES, ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_of_three_dtypes(dtype, weight, ring, kernel, device):
    shape = Shape(2, [[MILLION]], (1, 3), 3, 16)
    tensors = [x.to(kind).to(device) for x, kind in zip(shape.inputs(), (dtype, weight, ring), strict=True)]
    k, v = (torch.zeros(2, 6, 3, 16, dtype=kind, device=device) for kind in (ring, weight))
    q = append(shape, tensors, ids([1]), k, v, kernel)
    wanted = shape.call(*(x.double() for x in tensors), impl="reference")
    torch.testing.assert_close((q, k[:, 3:], v[:, 3:]), tuple(x.to(y) for x, y in zip(wanted, (q, k, v))))


def test_a_slot_out_of_range_writes_nothing(kernel, device):
    tensors = [x.float().to(device) for x in RING.inputs()]
    memory = torch.full((2, 4, 18, 2, 10), torch.nan, device=device)
    append(RING, tensors, ids([-1, 3, 1]), memory[0, 1:3], memory[1, 1:3], kernel)
    framed = memory.unflatten(2, (3, 6)).isnan()
    assert not framed[:, 1:3, 1].any() and framed[:, :, [0, 2]].all() and framed[:, [0, 3]].all()


@pytest.mark.parametrize("slots_of", ["each row", "all rows"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_two_rings_share_keys(impl, dtype, slots_of, kernel, device):
    """Both places hold the same bits, a row of -1 is left out, and all else is as it was."""
    impl = kernel if impl == "kernel" else impl
    tensors = [x.bfloat16().to(device) for x in RING.inputs()]
    rows = ids([3, 1], [0, -1], dtype=dtype).to(device)
    slots = torch.stack([ids([4, 0, 2], [1, 5, 3], dtype=dtype), ids([0, 1, 5], [2, 3, 4], dtype=dtype)]).to(device)
    if slots_of == "all rows":
        slots = slots[:, :1]
    memory = torch.full((2, 4, 36, 2, 10), torch.nan, dtype=torch.bfloat16, device=device)
    options = {"num_heads": 2, "grid": (2, 3)}
    frames = ids(*RING.frames).to(device)
    q = qk_norm_rope_append(*tensors, frames, slots, *memory, rows=rows, impl=impl, **options)
    wanted = RING.call(*tensors, impl="triton" if impl != "reference" else impl)
    torch.testing.assert_close(q, wanted[0])
    for ring, new in zip(memory, wanted[1:]):
        framed, new = ring.unflatten(1, (6, 6)), new.unflatten(1, (3, 6))
        for place, row in ((0, 0), (0, 1), (1, 0)):
            at = slots[place, row % slots.shape[1]].tolist()
            torch.testing.assert_close(framed[int(rows[place, row]), at], new[row])
        assert torch.equal(framed[3, slots[0, 0].long()], framed[0, slots[1, 0].long()])
        assert ring.isnan().sum() == ring.numel() - 3 * new[0].numel()


@pytest.mark.parametrize("rows", [[[0, 4]], [[0, -1]], [[0, 1], [9, -7]]], ids=str)
def test_a_row_out_of_range_writes_nothing(rows, kernel, device):
    tensors = [x.float().to(device) for x in RING.inputs()]
    memory = torch.full((2, 6, 18, 2, 10), torch.nan, device=device)
    slots = ids([0, 1, 2]).expand(len(rows), -1, -1).to(device)
    frames, there = ids(*RING.frames).to(device), [row for place in rows for row in place if 0 <= row < 4]
    qk_norm_rope_append(
        *tensors, frames, slots, *memory[:, 1:5], rows=ids(*rows).to(device), num_heads=2, grid=(2, 3), impl=kernel
    )
    written = [row for row in range(6) if not memory[:, row].isnan().any()]
    assert written == [1 + row for row in there] and memory.isnan().sum() == memory.numel() - len(there) * 2 * 360


def test_ids_and_slots_are_read_on_the_device(kernel, device):
    """One launch serves every block: on a GPU it is captured once and replayed with new ids and slots."""
    shape = Shape(1, [[0, 1]], (1, 3), 2, 8)
    tensors = [x.float().to(device) for x in shape.inputs()]
    frames, slots = ids([0, 1]).to(device), ids([0, 1]).to(device)
    k, v = torch.zeros(2, 1, 12, 2, 8, device=device)

    def visit() -> Tensor:
        return qk_norm_rope_append(*tensors, frames, slots, k, v, num_heads=2, grid=(1, 3), impl=kernel)

    with torch.no_grad():
        again = visit
        visit()
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = visit()

            def again() -> Tensor:
                graph.replay()
                return captured

        for block in (1, 2, 500_000):
            frames.copy_(ids([2 * block, 2 * block + 1]))
            slots.copy_(ids([2 * block % 4, (2 * block + 1) % 4]))
            q = again()
            wanted = shape.call(*tensors, frames=frames, impl="triton")
            torch.testing.assert_close(q, wanted[0])
            for ring, new in ((k, wanted[1]), (v, wanted[2])):
                for i, slot in enumerate(slots[0].tolist()):
                    torch.testing.assert_close(ring[:, 3 * slot : 3 * slot + 3], new[:, 3 * i : 3 * i + 3])


# As torch sees them


def test_opcheck_of_appending(kernel, device):
    shape = Shape(2, [[0, 9]], (1, 3), 2, 4)
    tensors = [x.float().to(device) for x in shape.inputs()]
    rings = [torch.zeros(4, 12, 2, 4, device=device)[::2], torch.zeros(2, 12, 2, 4, device=device)]
    slots = ids([2, 0], [1, 3]).to(device)
    append(shape, tensors, slots, *rings, kernel)  # loads the kernels
    op = torch.ops.hiar.qk_norm_rope_append_cuda if kernel == "cuda" else torch.ops.hiar.qk_norm_rope_append
    arguments = (*tensors, ids([0, 9]).to(device), slots, *rings, 2, 1, 3, 1e-6, 10000.0)
    torch.library.opcheck(op.default, arguments)
    rows, twice = ids([0, 1], [1, -1]).to(device), torch.stack([slots, 3 - slots])
    arguments = (*tensors, ids([0, 9]).to(device), twice, *rings, 2, 1, 3, 1e-6, 10000.0, None, rows)
    torch.library.opcheck(op.default, arguments)


def test_compile_appending(kernel, device):
    shape = Shape(2, [[0, 9]], (1, 3), 2, 8)
    tensors, frames = [x.float().to(device) for x in shape.inputs()], ids([0, 9]).to(device)
    slots = ids([2, 0], [1, 3]).to(device)

    def visit(k: Tensor, v: Tensor) -> Tensor:
        return qk_norm_rope_append(*tensors, frames, slots, k, v, num_heads=2, grid=(1, 3), impl=kernel)

    results = []
    for f in (visit, torch.compile(visit, fullgraph=True, backend="aot_eager")):
        k, v = torch.zeros(2, 2, 12, 2, 8, device=device)
        results.append((f(k, v), k, v))
    torch.testing.assert_close(results[1], results[0])


# Refusals

ONES = torch.ones(4)
QKV = torch.ones(2, 3, 12)
CACHE = torch.zeros(2, 6, 2, 2)


def ring(k: Tensor, v: Tensor, kernel: str) -> object:
    return qk_norm_rope_append(QKV, ONES, ONES, ids([0]), ids([0]), k, v, num_heads=2, grid=(1, 3), impl=kernel)


BAD_RINGS: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], str]] = {
    "float64": (lambda: (CACHE.double(), CACHE), "k_cache as bfloat16, float16 or float32, got torch.float64"),
    "channels apart": (
        lambda: (CACHE, torch.zeros(2, 6, 2, 4)[..., ::2]), "v_cache must have channels of stride 1, got 2"
    ),
    "rows in one place": (
        lambda: (torch.zeros(1, 6, 2, 2).expand(2, 6, 2, 2), CACHE), "overlap itself, got strides [0, 4, 2, 1]"
    ),
    "fewer slots": (
        lambda: (CACHE, torch.zeros(2, 3, 2, 2)), "v_cache must be [2, 6, 2, 2] like k_cache, got [2, 3, 2, 2]"
    ),
    "one ring for both": (lambda: (CACHE, CACHE), "k_cache and v_cache must be apart, got the same memory"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_RINGS)
def test_a_bad_ring_is_one_line(what, kernel, device, monkeypatch):
    rings, message = BAD_RINGS[what]
    for name in ("CACHE", "QKV", "ONES"):
        monkeypatch.setitem(globals(), name, globals()[name].to(device))
    with torch.device(device), refused(re.escape(message)):
        ring(*rings(), kernel)
