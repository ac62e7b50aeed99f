"""Keys and values in 8 bits: the error of a slot, the same numbers in every walk, and states that hold them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import make_rollout
from safetensors.torch import load, save
from tiny_model import MODEL, SIZE, TEXT, TINY, difference, make_model, run

import hiar_kernels
from hiar_kernels import EMPTY
from hiar_kernels.common.float8 import E4M3, LARGEST, ROW_DTYPES, bits, quantize_last, unpack_values
from hiar_kernels.common.float8 import quantize_frames as quantize
from hiar_model.config import ExecutionConfig, FlowSchedule
from hiar_model.models import cached_attention
from hiar_model.models.kv_cache import RingCache
from hiar_model.rollout import Rollout

pytestmark = pytest.mark.cpu

DOUBLE = make_model().double()
WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# One frame


def there_and_back(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = quantize(x)
    assert values.dtype == E4M3 and values.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (*x.shape[:-3], x.shape[-2])
    assert bool(scale.isfinite().all()) and bool((scale > 0).all())
    return (values.double() * scale.double()[..., None, :, None]).to(x.dtype), scale


def assert_within_bounds(x: torch.Tensor) -> None:
    """|error| <= max(|x| / 16, scale / 1024): half a step of e4m3, and what writing it in the dtype of x rounds."""
    back, scale = there_and_back(x)
    assert back.dtype == x.dtype
    exact, one = x.double(), scale.double()[..., None, :, None]
    allowed = torch.maximum(exact.abs() / 16, one / 1024)
    rounding = (exact.abs() + allowed) * (2 * torch.finfo(x.dtype).eps + 1e-6) + torch.finfo(x.dtype).tiny
    assert bool(((back.double() - exact).abs() <= allowed + rounding).all())


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-4, 0.03, 1.0, 250.0]), tokens=st.integers(1, 7))
def test_error_of_a_slot(dtype, seed, size, tokens):
    x = random(2, 3, tokens, 2, 8, seed=seed).double() * size
    x[:, :, :, 1] *= 0.01  # each head has a scale of its own
    assert_within_bounds(x.to(dtype))


def test_the_scale_is_of_a_frame_and_head():
    x = random(2, 3, 5, 2, 8)
    scale = quantize(x)[1]
    for b, f, h in itertools.product(range(2), range(3), range(2)):
        assert scale[b, f, h] == x[b, f, :, h].abs().max() / LARGEST
    values, _ = quantize(x)
    assert values.float().abs().amax((2, 4)).eq(LARGEST).all()  # the whole range is used


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-40, 1e-30, 3e38])
def test_frames_of_nothing_and_of_much(amax):
    x = torch.zeros(1, 2, 3, 2, 4)
    x[0, 0, 1, 0, 2] = amax
    back, _ = there_and_back(x)
    assert bool(back.isfinite().all())
    assert torch.equal(back[0, 1], x[0, 1]) and back[0, 0, 1, 1].eq(0).all()
    if amax > 1e-37:
        assert float(back[0, 0, 1, 0, 2]) == pytest.approx(amax, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_what_is_not_finite_stays_so(bad, dtype):
    """torch makes 448 of an infinity: a task that went wrong would look sound."""
    x = random(1, 2, 3, 2, 4, dtype=dtype)
    x[0, 1, 2, 1, 3] = bad
    back, scale = there_and_back(x)
    assert bool(scale.isfinite().all())
    assert bool(back[0, 1, :, 1].isnan().all())  # the whole head of the frame
    assert bool(back[0, 0].isfinite().all()) and bool(back[0, 1, :, 0].isfinite().all())


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("amax", [1e-45, 1e-40, 1e-3, 1.0, 449.0, 6e4, 3e38, float("inf")])
def test_nothing_beyond_the_format_is_cast(amax, dtype, monkeypatch):
    """What a cast does there has changed between releases of torch: below 464 all round to 448."""
    x = torch.cat([random(1, 1, 5, 2, 8, seed=seed).double() for seed in range(20)])
    x = (x / x.abs().amax((2, 4), keepdim=True) * amax).to(dtype)
    monkeypatch.setitem(ROW_DTYPES, torch.float64, LARGEST)
    values = quantize_last(x.transpose(-3, -2).flatten(-2), torch.float64)[0]
    assert values.dtype == torch.float64 and bool((values.isnan() | (values.abs() <= LARGEST * (1 + 1e-6))).all())


def test_a_frame_is_quantized_alike_in_any_company():
    x = random(4, 3, 5, 2, 8)
    values, scale = quantize(x)
    for b, f in itertools.product(range(4), range(3)):
        alone, its_scale = quantize(x[b, f].clone())
        assert torch.equal(bits(alone), bits(values[b, f])) and torch.equal(its_scale, scale[b, f])


# Rollouts

WALKS = [{"order": o, "pairs": p} for o, p in itertools.product(("step_first", "stream", "wavefront"), (False, True))]
KINDS = ({}, {"window_frames": 6}, {"window_frames": 6, "sink_frames": 1}, {"batch": 2, "window_frames": (3, 4, 7, 9)})


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_walks_agree(options):
    """Bit for bit where they are with keys as they come, and then up to rounding: pairs, and tasks of several steps in
    one batch, are other matrix products.
    """
    options = {"num_frames": 12, **options}
    same = torch.equal(run(order="stream", **options), run(**options))
    assert same or "batch" in options
    options["kv_dtype"] = E4M3
    expected = run(**options)
    assert expected.abs().max() > 0.1
    streamed = run(order="stream", **options)
    assert torch.equal(streamed, expected) or not same
    assert torch.equal(run(order="stream", executor="recorded", **options), streamed)
    in_double = run(model=DOUBLE, **options)
    for walk in WALKS[1:]:
        assert difference(run(model=DOUBLE, **walk, **options), in_double) < 1e-9, walk


@pytest.mark.parametrize("order", ["stream", "wavefront"])
def test_shared_kv_brings_its_scales(order):
    options = {"num_frames": 12, "window_frames": 6, "cache_source": "next_step"}
    whole = run(order="stream", **options)
    narrow = run(order="stream", kv_dtype=E4M3, **options)
    assert 0 < difference(narrow, whole) < 0.2
    double = run(model=DOUBLE, order="stream", kv_dtype=E4M3, **options)
    assert difference(run(model=DOUBLE, order=order, kv_dtype=E4M3, **options), double) < 1e-9
    assert torch.equal(run(order="stream", executor="recorded", kv_dtype=E4M3, **options), narrow)


def test_shared_kv_is_the_very_same():
    """The last block's keys at step 1 stand in both rings: nothing has overwritten them."""
    options = {"num_frames": 9, "order": "stream", "window_frames": 6, "cache_source": "next_step", **SIZE}
    rollout = make_rollout(MODEL, TEXT, FlowSchedule.uniform(2), kv_dtype=E4M3, **options)
    list(rollout)
    cache = rollout._executor.cache
    slots = cache.slots(0, [6, 7, 8])
    assert cache.frames[:, 0, slots].tolist() == [[6, 7, 8], [6, 7, 8]]
    for layer in range(TINY.num_layers):
        for ring in (cache.k[layer].unflatten(2, (6, -1)), cache.v[layer]):
            framed = bits(ring)[:, 0, slots]
            assert torch.equal(framed[0], framed[1])
        for scales in (cache.k_scales, cache.v_scales):
            assert torch.equal(scales[layer][0, 0, slots], scales[layer][1, 0, slots])


@pytest.mark.parametrize("options", KINDS[:2], ids=str)
def test_it_is_near_the_rollout_with_whole_keys(options):
    whole, double = run(num_frames=12, **options), run(model=DOUBLE, num_frames=12, **options)
    previous = 1e-4
    for stored, most in ((torch.bfloat16, 0.01), (E4M3, 0.1)):
        off = difference(run(num_frames=12, kv_dtype=stored, **options), whole)
        assert previous < off < most, stored
        previous = off
    assert torch.equal(run(num_frames=12, kv_dtype=torch.float32, **options), whole)
    assert difference(run(model=DOUBLE, num_frames=12, kv_dtype=torch.float32, **options), double) < 1e-5


@pytest.mark.parametrize("products", [None, "float8_e4m3fn"])
def test_attention_reads_the_ring_itself(products, monkeypatch):
    """No copy of keys or values; what a task sees, its own keys among them, is what is stored."""
    calls, attend = [], cached_attention.attention_fp8

    def seen(q, k, v, k_scales, v_scales, **options):
        out = attend(q, k, v, k_scales, v_scales, **options)
        wide = [x.float() * s[:, :, None, :, None] for x, s in (
            (k.unflatten(1, (6, -1)), k_scales), (unpack_values(v, k.shape[1] // 6), v_scales))]  # fmt: skip
        queries = q if products is None else q.float() * options["q_scales"][..., None]
        ids = {name: options[name] for name in ("mask", "q_frames", "kv_frames")}
        plain = hiar_kernels.reference.attention(queries, *(x.flatten(1, 2) for x in wide), **ids)
        calls.append((k.data_ptr(), v.data_ptr(), q.dtype, difference(out, plain)))
        return out

    monkeypatch.setattr(cached_attention, "attention_fp8", seen)
    options = {"num_frames": 9, "order": "stream", "window_frames": 6, "attention_dtype": products, **SIZE}
    rollout = make_rollout(MODEL, TEXT, FlowSchedule.uniform(2), kv_dtype=E4M3, **options)
    list(rollout)
    cache: RingCache = rollout._executor.cache
    rings = {ring.data_ptr() for layer in (*cache.k, *cache.v) for ring in layer}
    assert calls and {pointer for call in calls for pointer in call[:2]} == rings and not cache.scratch
    assert {call[2] for call in calls} == {torch.float32 if products is None else E4M3}
    furthest = max(call[3] for call in calls)
    assert furthest < 1e-5 if products is None else 1e-4 < furthest < 0.2  # probabilities have 4 bits


PRODUCTS = {"kv_dtype": E4M3, "attention_dtype": "float8_e4m3fn"}


def test_products_of_8_bits_in_every_order():
    """Up to a probability that rounds to its other side, where what is before it differs in its last bit."""
    options = {"num_frames": 12, "window_frames": 6, "sink_frames": 1, **PRODUCTS}
    expected = run(**options)
    assert torch.equal(run(order="stream", **options), expected)
    assert torch.equal(run(order="stream", executor="recorded", **options), expected)
    stored, whole = (
        run(num_frames=12, window_frames=6, sink_frames=1, kv_dtype=E4M3),
        run(12, window_frames=6, sink_frames=1),
    )
    assert 1e-4 < difference(expected, stored) < 0.2 and difference(expected, whole) < 0.2
    for walk in (*WALKS[3:], {"order": "stream", "cache_source": "next_step"}):
        found = run(**walk, **options)
        if "cache_source" not in walk:
            assert difference(found, expected) < 0.1, walk
        assert torch.equal(run(**walk, executor="recorded", **options), found)


@pytest.fixture
def alone() -> Iterator[None]:
    """A job of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("source", ["own", "next_step"])
@pytest.mark.parametrize("products", [{"kv_dtype": E4M3}, PRODUCTS], ids=["stored", "products"])
def test_ranks_that_share_heads_write_the_same_rings(products, source):
    options = {"num_frames": 9, "window_frames": 6, "order": "stream", "cache_source": source, **products}
    assert torch.equal(run(parallel="ulysses", **options), run(**options))


def test_what_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="attention_dtype float8_e4m3fn needs kv_dtype float8_e4m3fn: it is not set"):
        ExecutionConfig(attention_dtype="float8_e4m3fn")
    with pytest.raises(
        ValueError, match="attention_impl must be one of auto, reference, triton, gluon with kv_dtype .*'cudnn'"
    ):
        ExecutionConfig(kv_dtype="float8_e4m3fn", attention_impl="cudnn")
    with pytest.raises(ValueError, match="attention_dtype must be one of float8_e4m3fn, got 'bfloat16'"):
        ExecutionConfig(attention_dtype="bfloat16")


def test_memory_bytes_are_those_of_its_tensors():
    for dtype, stored in itertools.product((torch.float32, torch.bfloat16), (None, E4M3, torch.bfloat16)):
        cache = RingCache(TINY, (4, 6), 2, 8, dtype=dtype, kv_dtype=stored)
        tensors = (*cache.k, *cache.v, *cache.k_scales, *cache.v_scales, *cache.scratch, cache.frames)
        assert sum(x.nbytes for x in tensors) == cache.memory_bytes(TINY, (4, 6), 2, 8, dtype, kv_dtype=stored)
        assert bool(cache.scratch) == (stored not in (None, dtype, E4M3))


def test_a_state_goes_on_bit_for_bit():
    options = {"num_frames": 12, "order": "stream", "window_frames": 6, "kv_dtype": E4M3, **SIZE}

    def fresh(**more) -> Rollout:
        return make_rollout(MODEL, TEXT, FlowSchedule.uniform(3), **{**options, **more})

    expected = [block.latents for block in fresh()]
    first = fresh()
    result = [next(iter(first)).latents]
    state = first.state_dict()
    assert state["cache"]["k.0"].dtype == E4M3 and state["cache"]["v_scale.1"].dtype == torch.float32
    state["cache"] = load(save(state["cache"]))  # as on disk
    again = fresh()
    again.load_state_dict(state)
    result += [block.latents for block in again]
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    for other, name in (
        ({"kv_dtype": None}, "it has kv_dtype=float8_e4m3fn, this one has not"),
        ({"attention_dtype": E4M3}, "this one has attention_dtype=float8_e4m3fn, it has not"),
        ({"linear_dtype": E4M3}, "this one has linear_dtype=float8_e4m3fn, it has not"),
    ):
        with pytest.raises(ValueError, match=f"a different rollout: {name}"):
            fresh(**other).load_state_dict(state)
    with pytest.raises(ValueError, match=r"k\.0 must be torch.float32 .* got torch.float8_e4m3fn"):
        fresh(kv_dtype=None)._executor.cache.load_state_dict(state["cache"])
    frames = {name: x for name, x in state["cache"].items() if name.startswith("v.")}
    lying = {name: unpack_values(x, 2).flatten(2, 3) for name, x in frames.items()}  # as earlier builds wrote them
    assert all(x.shape == state["cache"]["k.0"].shape for x in lying.values())
    again._executor.cache.load_state_dict({**state["cache"], **lying})
    written = again._executor.cache.frames != EMPTY
    # Past its keys a slot that was never written holds what the memory held.
    for i, ring in enumerate(again._executor.cache.v):
        ours, theirs = bits(ring), bits(frames[f"v.{i}"])
        assert written.any() and torch.equal(ours[written], theirs[written])
        assert torch.equal(bits(unpack_values(ring, 2)), bits(unpack_values(frames[f"v.{i}"], 2)))
    del state["cache"]["k_scale.1"]
    with pytest.raises(ValueError, match=r"k_scale\.1 must be torch.float32 \[3, 1, 6, 2\], got nothing"):
        again._executor.cache.load_state_dict(state["cache"])


@pytest.mark.parametrize("wrong", [torch.float8_e5m2, torch.int8])
def test_other_dtypes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"kv_dtype must be one of .*float8_e4m3fn, got '(float8_e5m2|int8)'"):
        run(num_frames=6, kv_dtype=wrong)
