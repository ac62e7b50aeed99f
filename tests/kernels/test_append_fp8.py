"""Appending in 8 bits, eager: numbers and places by the book. Kernels: tests/interpreter/test_append_fp8.py."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from torch import Tensor

import hiar_kernels as hk
from hiar_kernels import append_fp8, pack_values, qk_norm_rope, qk_norm_rope_append_fp8, unpack_values
from hiar_kernels.common import float8
from hiar_kernels.common.float8 import nearest_, widened

pytestmark = pytest.mark.cpu

E4M3 = torch.float8_e4m3fn
SLOTS, GRID, HEADS, HEAD_DIM = 4, (3, 7), 2, 6
TOKENS = GRID[0] * GRID[1]
FRAMES = [[5, 6, 1_000_000], [0, 7, 2]]
NEW = torch.tensor([[2, 0, 1], [1, 3, 2]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def rings(rows: int = 2, tokens: int = TOKENS) -> list[Tensor]:
    """k_cache, v_cache and their scales; every byte of the caches is 3, every scale -1."""
    caches = ((rows, SLOTS * tokens, HEADS, HEAD_DIM), (rows, SLOTS, HEADS, HEAD_DIM, -(-tokens // 16) * 16))
    scales = [torch.full((rows, SLOTS, HEADS), -1.0) for _ in range(2)]
    return [*(torch.full(shape, 3, dtype=torch.uint8).view(E4M3) for shape in caches), *scales]


def keys_and_values(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    k, v = normal(2, 2, 3 * TOKENS, HEADS, HEAD_DIM).mul(normal(2, 2, 3 * TOKENS, HEADS, 1, seed=1).exp()).to(dtype)
    return k, v


def by_hand(x: Tensor) -> tuple[Tensor, float]:
    """One frame of one head [P, D] -> its 8 bits and its scale."""
    scale = x.float().abs().max() / 448
    return (x.float() / scale).to(E4M3), float(scale)


def assert_written(ring: list[Tensor], row: int, slot: int, k: Tensor, v: Tensor) -> None:
    """The slot of the ring's row holds k and v [P, H, D] of a frame, place by place."""
    k_cache, v_cache, k_scales, v_scales = ring
    tokens = len(k)
    for head in range(HEADS):
        values, scale = by_hand(k[:, head])
        actual = k_cache[row, slot * tokens : (slot + 1) * tokens, head]
        assert torch.equal(bytes_of(actual), bytes_of(values)) and float(k_scales[row, slot, head]) == scale
        values, scale = by_hand(v[:, head])
        assert float(v_scales[row, slot, head]) == scale
        for place in range(v_cache.shape[-1]):
            group, t, i = place // 16, place % 16 // 4, place % 4
            key = 16 * group + (2 * t + i if i < 2 else 8 + 2 * t + i - 2)
            wanted = bytes_of(values[key]) if key < tokens else torch.zeros(HEAD_DIM, dtype=torch.uint8)
            assert torch.equal(bytes_of(v_cache[row, slot, head, :, place]), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_and_places(dtype):
    k, v = keys_and_values(dtype)
    ring = rings()
    append_fp8(k, v, NEW, *ring)
    for row, slots in enumerate(NEW.tolist()):
        for frame, slot in enumerate(slots):
            part = slice(frame * TOKENS, (frame + 1) * TOKENS)
            assert_written(ring, row, slot, k[row, part], v[row, part])
    for row, slot in ((0, 3), (1, 0)):  # not named
        assert bool((bytes_of(ring[0]).unflatten(1, (SLOTS, -1))[row, slot] == 3).all())
        assert bool((bytes_of(ring[1])[row, slot] == 3).all())
        assert float(ring[2][row, slot].max()) == float(ring[3][row, slot].max()) == -1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_widened_is_exact(dtype, monkeypatch):
    monkeypatch.setattr(float8, "_AT_ONCE", 100)  # in two parts
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).view(2, 128)[:, 1::2]  # with a NaN, strided
    expected = values.to(dtype)
    assert torch.equal(widened(values, dtype).nan_to_num(999), expected.nan_to_num(999)) and expected.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_nearest_number_is_that_of_torchs_cast(dtype):
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).float()  # 0 to 448
    halfway = (numbers[1:] + numbers[:-1]) / 2  # exact; ties go to even
    beside = [halfway.nextafter(torch.tensor(x)) for x in (0.0, torch.inf)]
    y = torch.cat([numbers, halfway, *beside, 100 * normal(1000).clamp(-4, 4), torch.tensor([1e-40, torch.nan])])
    y = torch.cat([y, -y]).to(dtype)
    expected = y.to(E4M3).to(dtype)
    assert torch.equal(nearest_(y.clone()).nan_to_num(999), expected.nan_to_num(999)) and expected.isnan().any()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40])
def test_packed_values_come_back(tokens):
    values = normal(2, tokens, HEADS, HEAD_DIM)
    for x in (values, values.to(E4M3)):
        packed = pack_values(x)
        assert packed.shape == (2, HEADS, HEAD_DIM, -(-tokens // 16) * 16) and packed.dtype == x.dtype
        assert torch.equal(bytes_of(unpack_values(packed, tokens)), bytes_of(x))


@pytest.mark.parametrize("quantize_q", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_numbers_of_qk_norm_rope(dtype, quantize_q):
    c = HEADS * HEAD_DIM
    tensors = [normal(2, 3 * TOKENS, 3 * c).to(dtype), normal(c, seed=1), normal(c, seed=2)]
    options = {"num_heads": HEADS, "grid": GRID, "eps": 1e-5, "theta": 500.0}
    frames, wanted, found = torch.tensor(FRAMES), rings(), rings()
    q, k, v = qk_norm_rope(*tensors, frames, **options)
    append_fp8(k, v, NEW, *wanted)
    result = qk_norm_rope_append_fp8(*tensors, frames, NEW, *found, quantize_q=quantize_q, **options)
    for a, b in zip(found, wanted):
        assert torch.equal(bytes_of(a), bytes_of(b))
    if not quantize_q:
        assert torch.equal(result, q)
        return
    values, scales = hk.quantize_rows(q)
    assert torch.equal(bytes_of(result[0]), bytes_of(values)) and torch.equal(result[1], scales)


def test_two_rings_share_keys():
    """A frame lies in both rings with the same bits, and nowhere else; a row of -1 is left out."""
    k, v = keys_and_values()
    alone, both = rings(), rings(4)
    append_fp8(k, v, NEW, *alone)
    slots = torch.stack([NEW, torch.tensor([[3, 1, 0], [0, 1, 2]])])
    append_fp8(k, v, slots, *both, rows=torch.tensor([[3, 1], [2, -1]]))
    for source, target in zip(alone, both):
        source, target = (bytes_of(x).unflatten(1, (SLOTS, -1)) for x in (source, target))
        for row, item, there in ((3, 0, slots[0, 0]), (2, 0, slots[1, 0]), (1, 1, slots[0, 1])):
            assert torch.equal(target[row, there], source[item, NEW[item]])
    assert bool((bytes_of(both[0])[0] == 3).all()) and float(both[2][0].max()) == -1.0


def test_what_is_not_finite_stays_in_its_frame_and_head():
    k, v = keys_and_values()
    k[0, 0, 0, 0], v[0, TOKENS, 1, 3] = torch.nan, -torch.inf  # frame 0, head 0; frame 1, head 1
    k[0, 2 * TOKENS :, 1] = 0
    ring = rings()
    append_fp8(k, v, NEW, *ring)
    keys = ring[0].float()[0].unflatten(0, (SLOTS, TOKENS)).transpose(1, 2)[NEW[0]].isnan()  # frame, head, ...
    values = unpack_values(ring[1], TOKENS).float()[0].transpose(1, 2)[NEW[0]].isnan()
    assert bool(keys[0, 0].all()) and int(keys.sum()) == TOKENS * HEAD_DIM
    assert bool(values[1, 1].all()) and int(values.sum()) == TOKENS * HEAD_DIM
    assert float(ring[2][0, 2, 0]) == float(ring[3][0, 0, 1]) == 1.0
    assert float(ring[2][0, 1, 1]) == torch.finfo(torch.float32).tiny  # a frame of zeros
    assert bool((bytes_of(ring[1])[0, 0, 1].unflatten(-1, (2, 16))[:, 1].sum(-1) > 0).all())  # 5 of 16 places: NaN
    assert int((bytes_of(ring[1])[0, 0, 1, 0] == 0).sum()) == 32 - TOKENS  # the others stay 0


K, V = keys_and_values()
BAD = {
    "keys of another shape than values": (lambda r: append_fp8(K, V[:1], NEW, *r), "both alike, got [2, 63, 2, 6]"),
    "frames that do not divide": (
        lambda r: append_fp8(K[:, :62], V[:, :62], NEW, *r), "62 tokens must be a multiple of the frames in slots"
    ),
    "slots of another batch": (lambda r: append_fp8(K, V, NEW.repeat(2, 1), *r), "slots must be [2 or 1, 3], got [4"),
    "slots that are no tensor": (lambda r: append_fp8(K, V, [[0, 1, 2]], *r), "slots must be a torch.Tensor"),
    "a ring in bfloat16": (
        lambda r: append_fp8(K, V, NEW, r[0].bfloat16(), *r[1:]), "k_cache must be torch.float8_e4m3fn, got torch.bfl"
    ),
    "values not transposed": (
        lambda r: append_fp8(K, V, NEW, r[0], r[0].clone(), *r[2:]),
        "v_cache must be [2, 4, 2, 6, 32] beside k_cache, got [2, 84, 2, 6]",
    ),
    "scales of another ring": (
        lambda r: append_fp8(K, V, NEW, *r[:3], r[3][:, :3]), "v_scales must be [2, 4, 2] beside k_cache, got [2, 3, 2]"
    ),
    "scales in bfloat16": (
        lambda r: append_fp8(K, V, NEW, *r[:3], r[3].bfloat16()), "v_scales must be torch.float32, got torch.bfloat16"
    ),
    "keys of another head size": (
        lambda r: append_fp8(K[..., :4], V[..., :4], NEW, *r), "k_cache must be [2, n * 21, 2, 4], got [2, 84, 2, 6]"
    ),
    "rows of another batch": (
        lambda r: append_fp8(K, V, NEW[None], *r, rows=torch.zeros(1, 3, dtype=torch.int64)), "rows must be [1 or 2, 2]"
    ),
    "an unknown implementation": (
        lambda r: append_fp8(K, V, NEW, *r, impl="gluon"), "has no implementation 'gluon'; legal: auto"
    ),
    "a gradient": (
        lambda r: append_fp8(K.clone().requires_grad_(), V, NEW, *r), "has no gradient; 8 bits are for inference"
    ),
    "an odd head size": (
        lambda r: qk_norm_rope_append_fp8(
            torch.ones(2, 63, 30), torch.ones(10), torch.ones(10), NEW, NEW, *r, num_heads=2, grid=GRID
        ),
        "width 30 of qkv is not 3 x 2 heads of an even size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(what):
    call, message = BAD[what]
    ring = rings()
    with refused() as caught:
        call(ring)
    assert message in str(caught.value) and "append_fp8: " in str(caught.value)
    for found, untouched in zip(ring, rings()):
        assert torch.equal(bytes_of(found), bytes_of(untouched))
