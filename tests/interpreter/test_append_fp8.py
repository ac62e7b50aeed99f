"""Appending in 8 bits, Triton and CUDA C++ alike: the bits of the ops it is made of, place by place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from budget import normal
from refusals import refused
from torch import Tensor

from hiar_kernels import (
    append_fp8,
    backends,
    pack_values,
    qk_norm_rope_append,
    qk_norm_rope_append_fp8,
    quantize_rows,
    unpack_values,
)

from .test_qk_norm_rope_triton import DTYPES, MILLION, Shape, ids

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

E4M3 = torch.float8_e4m3fn
SLOTS = 4
UNTOUCHED = 0x33  # of every byte, of every scale: -1
RING = Shape(2, [[3, 4, MILLION], [0, 7, 2]], (1, 5), 2, 10)
SHAPES = {  # the CUDA kernel moves 16 bytes at a time, or single numbers where these do not fit
    "5 keys, heads of 10": RING,
    "one key": replace(RING, grid=(1, 1), heads=3, head_dim=2),
    "17 keys, one past a group": Shape(1, [[MILLION + 3]], (1, 17), 3, 16),
    "two tiles of keys": Shape(1, [[20]], (5, 13), 2, 32),
    "two tiles of channels": Shape(1, [[7, 8]], (1, 3), 1, 144),
    "two packs a thread": Shape(1, [[7]], (1, 2), 20, 128),
    "the widest, one head": Shape(1, [[MILLION]], (1, 1), 1, 8192),
}


def rings(shape: Shape, device: torch.device, rows: int | None = None) -> list[Tensor]:
    """k_cache, v_cache and their scales, all as they were before."""
    tokens, rows = shape.grid[0] * shape.grid[1], rows or shape.batch
    k = torch.full((rows, SLOTS * tokens, shape.heads, shape.head_dim), UNTOUCHED, dtype=torch.uint8, device=device)
    v = torch.full((rows, SLOTS, shape.heads, shape.head_dim, -(-tokens // 16) * 16), UNTOUCHED, dtype=torch.uint8)
    scales = torch.full((2, rows, SLOTS, shape.heads), -1.0, device=device)
    return [k.view(E4M3), v.to(device).view(E4M3), *scales]


def slots_of(shape: Shape) -> Tensor:
    """Slots of each frame: other ones in every row of the batch."""
    return torch.stack([(torch.arange(len(shape.frames[0])) * 3 + 2 - row) % SLOTS for row in range(shape.batch)])


def append(shape: Shape, tensors: list[Tensor], ring: list[Tensor], impl: str, **options):
    device = tensors[0].device
    options = {"slots": slots_of(shape).to(device), "num_heads": shape.heads, "grid": shape.grid, **options}
    frames = options.pop("frames", ids(*shape.frames)).to(device)
    return qk_norm_rope_append_fp8(
        *tensors, frames, options.pop("slots"), *ring, quantize_q=True, impl=impl, **options
    )  # fmt: skip


def of_parts(shape: Shape, tensors: list[Tensor], impl: str) -> list[Tensor]:
    """q, k, v [B, T, H, D] that the op in full precision writes."""
    k, v = tensors[0].new_zeros(2, shape.batch, shape.tokens, shape.heads, shape.head_dim)
    frames = ids(*shape.frames).to(k.device)
    slots = torch.arange(frames.shape[1], device=k.device)[None]
    q = qk_norm_rope_append(
        *tensors, frames, slots, k, v, num_heads=shape.heads, grid=shape.grid, impl=impl
    )  # fmt: skip
    return [q, k, v]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """To the bit; on a GPU 8-bit numbers may be the next one, and scales differ by a rounding of what they scale:
    compilers contract products and sums of two kernels differently.
    """
    for a, b in zip(actual, expected, strict=True):
        a, b = a.cpu(), b.cpu()
        if actual[0].is_cuda:
            torch.testing.assert_close(a.float(), b.float(), rtol=0.13, atol=2**-8, equal_nan=True)
            assert float((a.float() != b.float()).float().mean()) < 0.02
        else:
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_numbers_of_its_parts(name, dtype, kernel, device):
    """q, k and v as qk_norm_rope_append gives them, then the reference of quantising; the rest is as it was."""
    shape = SHAPES[name]
    tensors = [x.to(dtype).to(device) for x in shape.inputs()]
    actual, expected = rings(shape, device), rings(shape, torch.device("cpu"))
    q, q_scales = append(shape, tensors, actual, kernel)
    parts = [x.cpu() for x in of_parts(shape, tensors, kernel)]
    append_fp8(*parts[1:], slots_of(shape), *expected, impl="reference")
    assert_same([*actual, q, q_scales], [*expected, *quantize_rows(parts[0], impl="reference")])
    assert torch.equal(actual[3].cpu(), expected[3])  # values are moved, not computed
    assert torch.equal(actual[1].cpu().view(torch.uint8), expected[1].view(torch.uint8))


def test_q_in_its_own_dtype(kernel, device):
    tensors = [x.bfloat16().to(device) for x in RING.inputs()]
    actual, again = rings(RING, device), rings(RING, device)
    append(RING, tensors, again, kernel)
    q = qk_norm_rope_append_fp8(
        *tensors, ids(*RING.frames).to(device), slots_of(RING).to(device), *actual, num_heads=2, grid=RING.grid,
        impl=kernel,
    )  # fmt: skip
    torch.testing.assert_close(q, of_parts(RING, tensors, kernel)[0])
    assert_same(actual, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_keys_from_elsewhere(name, dtype, device):
    """append_fp8, of keys and values in any order of memory."""
    shape = SHAPES[name]
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    k, v = (3 * normal(2, *size)).to(dtype)
    actual, expected = rings(shape, device), rings(shape, torch.device("cpu"))
    append_fp8(k, v, slots_of(shape), *expected, impl="reference")
    turned = [k.to(device).transpose(1, 2).contiguous().transpose(1, 2), v.to(device).mT.contiguous().mT]
    append_fp8(*turned, slots_of(shape).to(device), *actual, impl="triton")
    for a, b in zip(actual, expected):
        assert torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))


def steps_and_ties() -> Tensor:
    """All numbers of e4m3, what lies halfway between two, the nearest float32 on both sides of that: [1, 48, 16]."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    levels = codes[codes.isfinite()].unique()
    ties = (levels[1:] + levels[:-1]) / 2
    sides = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (1000.0, -1000.0)]
    numbers = torch.cat([levels, ties, *sides, -torch.zeros(1)])  # the largest is 448: the scale is 1
    return torch.cat([numbers, numbers.new_zeros(-len(numbers) % 256)]).view(1, -1, 1, 16)


def test_every_step_and_tie_of_the_format(kernel, device):
    """Values pass untouched, whatever the kernel; Triton's keys too."""
    x = steps_and_ties().to(device)
    shape = Shape(1, [[0]], (1, x.shape[1]), 1, 16)
    qkv = torch.cat([torch.ones(1, x.shape[1], 32, device=device), x[:, :, 0]], -1)
    ones, ring = torch.ones(16, device=device), rings(shape, device)
    append(shape, [qkv, ones, ones], ring, kernel)
    actual = [unpack_values(ring[1].cpu()[:, 2], x.shape[1])]
    if kernel == "triton":
        append_fp8(x, x, slots_of(shape).to(device), *ring, impl="triton")
        actual += [ring[0].cpu()[:, 2 * x.shape[1] : 3 * x.shape[1]], unpack_values(ring[1].cpu()[:, 2], x.shape[1])]
    for values in actual:
        assert torch.equal(values.contiguous().view(torch.uint8), x.cpu().to(E4M3).view(torch.uint8))
    assert float(ring[3][0, 2, 0]) == 1.0


@pytest.mark.parametrize("impl", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_two_rings_share_keys(shared, dtype, impl, kernel, device):
    impl = kernel if impl == "kernel" else impl
    tensors = [x.bfloat16().to(device) for x in RING.inputs()]
    slots = torch.stack([ids([2, 0, 1], [1, 3, 2], dtype=dtype), ids([3, 1, 0], [0, 1, 2], dtype=dtype)]).to(device)
    slots = slots[:, :1] if shared else slots
    rows = ids([3, 1], [2, -1], dtype=dtype).to(device)
    alone, both = rings(RING, device), rings(RING, device, 4)
    append(RING, tensors, alone, impl, slots=slots[0])
    append(RING, tensors, both, impl, slots=slots, rows=rows)
    for source, target in zip(alone, both):
        source, target = (x.view(torch.uint8).unflatten(1, (SLOTS, -1)) for x in (source, target))
        for row, item, place in ((3, 0, 0), (2, 0, 1), (1, 1, 0)):
            here, there = (slots[n, item % slots.shape[1]].long() for n in (0, place))
            assert torch.equal(target[row, there], source[item, here])
    assert bool((both[0].view(torch.uint8)[0] == UNTOUCHED).all()) and float(both[2][0].max()) == -1.0


@pytest.mark.parametrize("outside", ["a slot", "a row"])
def test_what_is_out_of_range_writes_nothing(outside, kernel, device):
    """Neighbours of the ring in memory stay as they are."""
    tensors = [x.float().to(device) for x in RING.inputs()]
    memory = rings(RING, device, 6)
    ring = [x[2:4] for x in memory]
    if outside == "a slot":
        append(RING, tensors, ring, kernel, slots=ids([-1, SLOTS, 1]))
        written = [(row, 1) for row in (2, 3)]
    else:
        slots, rows = ids([0, 1, 2]).expand(2, 1, 3), ids([0, 2], [-1, -3])
        append(RING, tensors, ring, kernel, slots=slots.to(device), rows=rows.to(device))
        written = [(2, slot) for slot in (0, 1, 2)]
    for x, before in zip(memory, rings(RING, device, 6)):
        x, before = (y.view(torch.uint8).unflatten(1, (SLOTS, -1)) for y in (x, before))
        changed = (x != before).flatten(2).any(-1).nonzero().tolist()
        assert changed == [list(place) for place in written]


def test_what_is_not_finite_stays_in_its_frame_and_head(kernel, device):
    """In keys it reaches the whole token, which is normed as one; places past the last key stay 0."""
    tokens, c = 5, 20
    qkv, *weights = (x.float().to(device) for x in RING.inputs())
    qkv[0, 0, 2 * c], qkv[0, tokens, 2 * c + 10] = torch.nan, -torch.inf  # v: frame 0 head 0, frame 1 head 1
    qkv[0, 2 * tokens, c] = torch.nan  # k: frame 2, both heads
    qkv[1, :tokens, 2 * c :] = 0
    ring = rings(RING, device)
    append(RING, [qkv, *weights], ring, kernel)
    k, v, k_scales, v_scales = (x.cpu() for x in ring)
    slots = slots_of(RING)[0]
    nan_keys = k.float()[0].unflatten(0, (SLOTS, tokens))[slots].isnan()
    nan_values = unpack_values(v, tokens).float()[0, slots].isnan()  # [F, P, H, D]
    assert bool(nan_keys[2].all()) and not nan_keys[:2].any()
    assert bool(nan_values[0, :, 0].all()) and bool(nan_values[1, :, 1].all())
    assert int(nan_values.sum()) == 2 * tokens * 10
    assert k_scales[0, slots[2]].tolist() == [1.0, 1.0] and float(v_scales[0, slots[0], 0]) == 1.0
    places = v.view(torch.uint8)[0, slots]
    assert int((places[0, 0, 0] == 0).sum()) == 16 - tokens
    assert float(v_scales[1, slots_of(RING)[1, 0]].max()) == torch.finfo(torch.float32).tiny  # a frame of zeros


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of memory for 4 rows: 2 rows of a ring
    "every other row": lambda x: x[1::2],
    "the first rows": lambda x: x[:2],
    "the dimensions in another order": lambda x: x.movedim(0, -2).contiguous().movedim(-2, 0)[1:3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [16, 6])
def test_strided_rings(head_dim, layout, kernel, device):
    shape = replace(RING, head_dim=head_dim)
    tensors = [x.bfloat16().to(device) for x in shape.inputs()]
    expected, memory = rings(shape, device), rings(shape, device, 4)
    actual = [LAYOUTS[layout](x.view(torch.uint8)).view(x.dtype) for x in memory[:2]]
    actual += [LAYOUTS[layout](x) for x in memory[2:]]
    append(shape, tensors, expected, kernel)
    append(shape, tensors, actual, kernel)
    for a, b in zip(actual, expected):
        assert torch.equal(a.contiguous().view(torch.uint8), b.view(torch.uint8))


def test_ids_and_slots_are_read_on_the_device(kernel, device):
    """One call serves every block: on a GPU it is captured once and replayed with new ids and slots."""
    shape = Shape(1, [[0, 1]], (1, 3), 2, 16)
    tensors = [x.bfloat16().to(device) for x in shape.inputs()]
    frames, slots, ring = ids([0, 1]).to(device), ids([0, 1]).to(device), rings(shape, device)

    def visit() -> tuple[Tensor, Tensor]:
        return append(shape, tensors, ring, kernel, frames=frames, slots=slots)

    with torch.no_grad():
        again = visit
        visit()
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = visit()

            def again() -> tuple[Tensor, Tensor]:
                graph.replay()
                return captured

        for block in (1, 2, 500_000):
            frames.copy_(ids([2 * block, 2 * block + 1]))
            slots.copy_(ids([2 * block % 4, (2 * block + 1) % 4]))
            actual, fresh = again(), rings(shape, device)
            expected = append(shape, tensors, fresh, kernel, frames=frames.clone(), slots=slots.clone())
            assert torch.equal(actual[0].view(torch.uint8), expected[0].view(torch.uint8))
            for a, b in zip(ring, fresh):
                a, b = (x.view(torch.uint8).unflatten(1, (SLOTS, -1))[:, slots[0].long()] for x in (a, b))
                assert torch.equal(a, b)


def test_heads_farther_apart_than_32_bits_can_count(device):
    """The third head's keys begin at number 2^31; of the memory between, a CPU gives none that nobody touches."""
    shape = Shape(1, [[0]], (1, 5), 3, 16)
    dense = torch.randn(1, 5, 3, 16, generator=torch.Generator().manual_seed(0)).half().to(device)
    memory = torch.zeros(2**31 + dense.numel(), dtype=torch.float16, device=device)
    far = memory.as_strided(dense.shape, (0, 16, 2**30, 1)).copy_(dense)
    near_ring, far_ring = rings(shape, device), rings(shape, device)
    for k, ring in ((dense, near_ring), (far, far_ring)):
        append_fp8(k, k, ids([1]).to(device), *ring, impl="triton")
    assert_same(far_ring, near_ring)


# As torch sees them


def arguments_of(device: torch.device, twice: bool) -> tuple[object, ...]:
    shape = Shape(2, [[0, 9]], (1, 3), 2, 4)
    tensors = [x.float().to(device) for x in shape.inputs()]
    caches = [x.view(torch.uint8) if x.dtype == E4M3 else x for x in rings(shape, device)]
    slots = ids([2, 0], [1, 3]).to(device)
    rows = ids([0, 1], [1, -1]).to(device) if twice else None
    slots = torch.stack([slots, 3 - slots]) if twice else slots
    return (*tensors, ids([0, 9]).to(device), slots, *caches, 2, 1, 3, 1e-6, 10000.0, True, rows)


@pytest.mark.parametrize("twice", [False, True])
def test_opcheck(twice, kernel, device):
    append(RING, [x.to(device).float() for x in RING.inputs()], rings(RING, device), kernel)  # loads the kernels
    checks = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}  # test_compile traces
    op = torch.ops.hiar.qk_norm_rope_append_fp8_cuda if kernel == "cuda" else torch.ops.hiar.qk_norm_rope_append_fp8
    torch.library.opcheck(op.default, arguments_of(device, twice), **checks)
    if kernel == "triton":
        k, v = torch.randn(2, 2, 6, 2, 4, device=device)
        append_fp8(k, v, ids([2, 0]).to(device), *rings(Shape(2, [[0, 9]], (1, 3), 2, 4), device), impl="triton")
        torch.library.opcheck(torch.ops.hiar.append_fp8.default, (k, v, *arguments_of(device, False)[4:9]), **checks)


def test_compile(kernel, device):
    shape = Shape(2, [[0, 9]], (1, 3), 2, 8)
    tensors = [x.float().to(device) for x in shape.inputs()]

    def visit(ring: list[Tensor]) -> tuple[Tensor, Tensor]:
        return append(shape, tensors, ring, kernel)

    results = []
    for f in (visit, torch.compile(visit, fullgraph=True, backend="aot_eager")):
        ring = rings(shape, device)
        results.append([*f(ring), *ring])
    for a, b in zip(*results):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# Refusals

BAD: dict[str, tuple[Callable[[list[Tensor]], list[Tensor]], str]] = {
    "channels apart": (
        lambda r: [torch.zeros(2, 20, 2, 20, dtype=torch.uint8, device=r[0].device)[..., ::2].view(E4M3), *r[1:]],
        "k_cache must have channels of stride 1, got 2",
    ),
    "keys apart": (lambda r: [r[0], pack_values(r[0].view(2, 4, 5, 2, 10)).mT.contiguous().mT, *r[2:]],
        "v_cache must have keys of stride 1, got 10"),
    "rows in one place": (
        lambda r: [r[0][:1].expand(2, -1, -1, -1), *r[1:]], "k_cache must not overlap itself, got strides [0, 20, 10"
    ),
    "one memory for both scales": (lambda r: [*r[:3], r[2]], "k_scales and v_scales must be apart, got the same mem"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_ring_is_one_line(what, kernel, device):
    change, message = BAD[what]
    with refused(re.escape(f"qk_norm_rope_append_fp8: {message}")):
        append(RING, [x.float().to(device) for x in RING.inputs()], change(rings(RING, device)), kernel)


def test_other_refusals(kernel, device):
    tensors = [x.to(device) for x in RING.inputs()]
    with refused(re.escape(f"impl='{kernel}' takes q_weight as bfloat16, float16 or float32, got torch.float64")):
        append(RING, tensors, rings(RING, device), kernel)
    if kernel == "triton":
        keys = torch.zeros(2, 15, 2, 10, device=device, dtype=torch.float64)
        with refused(re.escape("append_fp8: impl='triton' takes k as bfloat16, float16 or float32, got torch.float64")):
            append_fp8(keys, keys, slots_of(RING).to(device), *rings(RING, device), impl="triton")
    assert backends().ops["qk_norm_rope_append_fp8"].implementations == ("reference", "triton", "cuda")
