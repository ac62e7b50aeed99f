"""The forward kernel with keys and values by tensor descriptors, and when it is that way; in 16 bits, as it must be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from budget import assert_within_budget
from test_attention import Case, make
from torch import Tensor

from hiar_kernels import EMPTY, BlockCausal, KVContext, _triton, attention

from .test_attention_triton import RING, bidirectional, poison, run

pytestmark = pytest.mark.interpreter

FAR = [f + 1_000_000 if f >= 0 else f for f in RING]
# Tiles of 32 keys begin at any token: frames of 21 share them, those of 35 and 71 hold one or two and a rest.
CASES = {
    "odd lengths": lambda: bidirectional(13, 71, width=64),
    "wide heads": lambda: bidirectional(5, 64, width=128),
    "wrapped ring, far on": lambda: make(
        [[1_000_006, 1_000_007]], [FAR], {"block": 2, "sink": 1, "first": 1_000_000}, [5], tokens=21, width=64
    ),
    "block-causal, wide frames": lambda: make([list(range(4))], [list(range(4))], {"block": 2}, tokens=35, width=64),
    "pair": lambda: make([[3, 4, 5, 6, 7, 8]], [RING], {"block": 3}, [4], tokens=35, heads=1, width=64),
    "rows at different steps": lambda: make(
        [[6, 7], [4, 5], [0, 1]], [RING, [5, 4, 3, 2, 1, 0] + [EMPTY] * 3, [1, 0] + [EMPTY] * 7],
        {"block": 2, "sink": 1}, [5, None, 4], tokens=35, heads=1, width=64,
    ),
    "nothing to see": lambda: make([[0, 1]], [[6, 7, EMPTY]], {"block": 2}, [3], tokens=35, heads=1, width=64),
}  # fmt: skip


@pytest.fixture
def triton_fwd(device):
    _triton.load("attention", torch.zeros(1, device=device))
    from hiar_kernels.attention import triton_fwd

    return triton_fwd


@pytest.fixture
def tile(device):
    from hiar_kernels.attention._launch import Tile

    return Tile(16, 32, 4, 1, 16, tma=True) if device.type == "cpu" else Tile(64, 32, 4, 2, 16, tma=True)


@pytest.fixture
def loaded(device, monkeypatch) -> list[Tensor]:
    """What came by descriptor; of the interpreter alone, a GPU does not tell."""
    found: list[Tensor] = []
    if device.type == "cpu":
        from triton.runtime import interpreter

        load = interpreter.InterpreterBuilder.create_descriptor_load

        def seen(self, *args):
            result = load(self, *args)
            found.append(torch.from_numpy(result.data.view("int16").copy()).flatten())
            return result

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_descriptor_load", seen)
    return found


def assert_good(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    out, lse, _ = run(case, dtype, device)
    (exact, exact_lse), _ = case.rounded(dtype).plain()
    (eager, _), _ = case.rounded(dtype).plain(dtype)
    assert_within_budget(out, eager, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_by_descriptors(name, splits, device, poisoned, triton_fwd, tile, loaded, monkeypatch):
    """No key that a tile of queries does not see is loaded in whole tiles: those hold NaN."""
    case = CASES[name]()
    case = case if case.seen is None else poison(case)
    monkeypatch.setattr(triton_fwd, "forward_tile", lambda *_: replace(tile, splits=splits))
    dtype = torch.float16 if name == "pair" else torch.bfloat16
    assert_good(case, dtype, device)
    if device.type == "cpu":
        assert bool(loaded) == (name != "nothing to see")
        assert not any(x.view(dtype).isnan().any() for x in loaded)


def test_same_bits_as_by_pointers(device, triton_fwd, tile, loaded, monkeypatch):
    """Rows of a ring of several steps, keys beside values in one buffer: strided, used as they lie."""
    case = poison(CASES["rows at different steps"]())
    buffer = torch.full((3, 2, *case.k.shape[1:], 2), float("nan"), dtype=torch.bfloat16).permute(0, 1, 2, 5, 3, 4)
    buffer = buffer.contiguous().to(device)  # [row, step, T, k or v, H, D]
    buffer[:, 1, :, 0], buffer[:, 1, :, 1] = case.k.to(buffer), case.v.to(buffer)
    q, k, v = case.q.to(buffer), buffer[:, 1, :, 0], buffer[:, 1, :, 1]
    options = {key: x.to(device) for key, x in case.options.items()}
    results = []
    for tma in (True, False):
        monkeypatch.setattr(triton_fwd, "forward_tile", lambda *_, tma=tma: replace(tile, tma=tma, splits=1))
        results.append(attention(q, k, v, mask=case.mask, return_lse=True, impl="triton", **options))
    assert bool(loaded) or device.type != "cpu"
    for a, b in zip(*results):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    assert not results[0][0].isnan().any()


# Which way: by architecture and by what the tensors allow


def wanted(q: Tensor, k: Tensor, v: Tensor, arch: int, monkeypatch, **given: bool):
    from hiar_kernels.attention import _launch

    monkeypatch.setattr(_launch, "architecture", lambda _: arch)
    return _launch.forward_tile(q, k, v, given.get("context", False), given.get("counts", False))


def test_where_descriptors_are_used(device, triton_fwd, monkeypatch):
    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    x = zeros(2, 256, 3, 128)
    ring = zeros(4, 2, 256, 3, 128)
    fused = zeros(2, 256, 3, 3, 64)
    for arch, tma in ((0, False), (80, False), (89, False), (90, True), (100, True), (120, True)):
        for q, k, v in ((x, x, x), (x, ring[:, 0][:2], ring[:, 1][:2]), (fused.unbind(2))):
            assert wanted(q, k, v, arch, monkeypatch).tma == tma
    few = x[:, :64]
    odd = zeros(2 * 256 * 3 * 128 + 1)[1:].view(x.shape)
    uneven = zeros(2, 256, 3 * 128 + 4)[..., : 3 * 128].unflatten(2, (3, 128))
    one_for_all = zeros(1, 256, 3, 128).expand(2, -1, -1, -1)
    small, full = zeros(2, 256, 3, 32), zeros(2, 256, 3, 128, dtype=torch.float32)
    for k, v in ((few, few), (x, odd), (odd, x), (uneven, x), (x, one_for_all), (small, small), (full, full)):
        assert not wanted(k, k, v, 90, monkeypatch).tma
    assert not wanted(x, x, x, 90, monkeypatch, context=True).tma
    assert not wanted(x, x, x, 90, monkeypatch, counts=True).tma


@pytest.mark.parametrize("wrong", ["dtype", "width", "keys", "strides", "context"])
def test_a_configuration_that_does_not_fit_is_refused(wrong, device, triton_fwd, tile):
    dtype, width = torch.float32 if wrong == "dtype" else torch.bfloat16, 32 if wrong == "width" else 64
    q = torch.zeros(1, 4, 1, width, dtype=dtype, device=device)
    k = v = torch.zeros(1, 0 if wrong == "keys" else 4, 1, width + 1, dtype=dtype, device=device)[..., :width]
    if wrong != "strides":
        k, v = k.contiguous(), v.contiguous()
    context = (k, v) if wrong == "context" else (None, None)
    message = {
        "dtype": "takes 16-bit keys and values of head_dim 64 or 128, got torch.float32 of 64",
        "width": "takes 16-bit keys and values of head_dim 64 or 128, got torch.bfloat16 of 32",
        "keys": r"takes one key at least, got shape \[1, 0, 1, 64\]",
        "strides": r"base and strides are multiples of 16 bytes, got strides \(260, 65, 65, 1\)",
        "context": "takes no context, got one",
    }[wrong]
    with pytest.raises(ValueError, match=message):
        triton_fwd.launch(q, k, v, *context, None, None, None, None, [], [], 1.0, config=tile)


def test_frame_ids_beyond_32_bit_sums_are_refused(device):
    x = torch.zeros(1, 1, 1, 16, device=device)
    largest = BlockCausal(1, 1, first_frame=2**30 - 1)
    assert attention(x, x, x, mask=largest, impl="triton").shape == x.shape
    beyond = BlockCausal(1, 1, first_frame=2**30)
    with pytest.raises(ValueError, match=r"takes frame ids below 1073741824, got mask.first_frame 1073741824"):
        attention(x, x, x, mask=beyond, impl="triton")
    context = KVContext(x, x, torch.zeros(1, 1, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="got mask.first_frame"):
        attention(x, x, x, mask=beyond, context=context, impl="triton")
