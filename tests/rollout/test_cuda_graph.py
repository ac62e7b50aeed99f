"""Captured launches, by the stand-in: the same latents from the same device state, whatever the walk."""

from __future__ import annotations

import gc
import sys
import types
import weakref

import pytest
import torch
from made_runs import make_rollout
from recorder import Recorder, _Reads
from tiny_model import MODEL, SHALLOW, SIZE, TEXT, TINY, difference, make_model, run
from torch.utils._pytree import tree_flatten

import hiar_kernels
from hiar_kernels.qk_norm_rope.inputs import turns_of
from hiar_model.config import FlowSchedule
from hiar_model.models.cached_attention import CachedAttention
from hiar_model.rollout import Rollout
from hiar_model.rollout.noise import KeyedNoise
from hiar_model.rollout.readback import Readback

pytestmark = pytest.mark.cpu

WALKS = [
    {"order": "step_first"},
    {"order": "step_first", "pairs": True},
    {"order": "stream"},
    {"order": "stream", "pairs": True},
    {"order": "wavefront"},
    {"order": "wavefront", "pairs": True},
    {"order": "block_first"},
    {"order": "stream", "cache_source": "next_step"},
    {"order": "wavefront", "cache_source": "next_step"},
]


def made(executor: str, num_frames: int | None = 18, **options) -> Rollout:
    model, text = options.pop("model", SHALLOW), options.pop("text", TEXT)
    options = {"num_frames": num_frames, "executor": executor, **SIZE, **options}
    return make_rollout(model, text, FlowSchedule.uniform(4), **options)


def latents(rollout: Rollout) -> torch.Tensor:
    return torch.cat([block.latents for block in rollout], 1)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])  # by frame ids on the device; by layouts, as a library
@pytest.mark.parametrize("walk", WALKS, ids=str)
def test_captured_and_eager_are_the_same_bits(walk, impl):
    """Every walk with all options and both implementations; a prefix, and windows by step, with one of them each."""
    shape = (1, 4, TINY.in_channels, *SIZE.values())
    prefix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    more = {
        "reference": {"window_frames": 7, "sink_frames": 1, "prefix": prefix, "num_frames": 19, "first_frame": 5},
        "sdpa": {"window_frames": (6, 7, 9, 12), "trajectory": "ode", "batch": 2},
    }
    model = {"reference": MODEL, "sdpa": SHALLOW}[impl]
    for options in ({"window_frames": 9}, more[impl]):
        with hiar_kernels.prefer(impl):
            options = {"num_frames": 15, "model": model, **options}  # every ring wraps
            eager, recorded = (made(executor, **walk, **options) for executor in ("eager", "recorded"))
            for one, other in zip(eager, recorded, strict=True):
                assert torch.equal(one.latents, other.latents), options
        # rings, not only results: the same keys in the same slots under the same frame ids
        one, other = (rollout._executor.cache.state_dict() for rollout in (eager, recorded))
        held = one["frames"] >= 0
        assert torch.equal(one["frames"], other["frames"]) and bool(held.any())
        seen = held.repeat_interleave(eager._executor.cache.frame_tokens, 2)
        for name in one.keys() - {"frames"}:
            assert torch.equal(one[name][seen], other[name][seen]), name
        assert recorded._executor.counters.launches == eager._executor.counters.launches
        assert recorded._executor.counters.captures and not eager._executor.counters.captures


def test_the_rings_move_on_by_themselves():
    """On the device, in the replay; the host only keeps count."""
    with hiar_kernels.prefer("reference"):
        rollout = made("recorded", num_frames=None, order="stream", window_frames=6)
        cache = rollout._executor.cache
        blocks = iter(rollout)
        for n in range(8):
            wanted = list(cache.write_position)

            def seek(index: int, frame: int, n: int = n) -> None:
                assert n == 0 or cache.write_position[index] == frame, "written from the host"
                type(cache).seek(cache, index, frame)

            cache.seek = seek
            next(blocks)
            assert cache.positions[:, 0].tolist() == cache.write_position != wanted
            assert cache.frames[:, 0].tolist() == cache.slot_frames


@pytest.mark.parametrize("walk", WALKS, ids=str)
def test_captures_do_not_grow_with_the_video(walk):
    counts = []
    with hiar_kernels.prefer("reference"):
        for frames in (24, 36):
            rollout = made("recorded", num_frames=frames, window_frames=9, **walk)
            latents(rollout)
            counts.append(rollout._executor.counters.captures)
    assert counts[0] == counts[1]
    # growth is served by the graphs of the full window: what differs are kinds of tasks, and how full a diagonal is
    few = {"step_first": 2, "block_first": 2, "stream": 2 * 4, "wavefront": 4 * 4}
    assert counts[0] <= few[walk["order"]] + 4 * ("pairs" in walk), counts


def test_by_layout_captures_follow_the_visible_blocks():
    """A library is told lengths: every block of the growth is another graph; a full ring is one, wherever it begins."""
    counts = []
    with hiar_kernels.prefer("sdpa"):
        for frames in (30, 60):
            rollout = made("recorded", num_frames=frames, order="stream", window_frames=9)
            latents(rollout)
            counts.append(rollout._executor.counters.captures)
    assert counts[0] == counts[1]
    assert counts[0] == 3 * (4 + 1), counts  # four denoise tasks and a batch of cache tasks, at 3, 6 and 9 frames


def test_another_prompt_needs_no_other_graph():
    other = torch.randn(1, 2, TINY.text_dim, generator=torch.Generator().manual_seed(3))  # another length too
    with hiar_kernels.prefer("reference"):
        for walk in ({"order": "stream"}, {"order": "step_first"}):
            eager, recorded = (
                made(e, text=lambda block: TEXT if block < 4 else other, window_frames=6, **walk)
                for e in ("eager", "recorded")
            )
            constant = made("recorded", window_frames=6, **walk)
            found, wanted = latents(recorded), latents(eager)
            assert torch.equal(found, wanted)
            assert difference(found, latents(constant)) > 0.01
            assert recorded._executor.counters.captures == constant._executor.counters.captures


def test_a_state_goes_on_in_the_other_executor():
    with hiar_kernels.prefer("reference"):
        whole = latents(made("eager", order="wavefront", window_frames=9))
        for first, second in (("eager", "recorded"), ("recorded", "eager"), ("recorded", "recorded")):
            begun = made(first, order="wavefront", window_frames=9)
            blocks = iter(begun)
            parts = [next(blocks).latents for _ in range(3)]
            resumed = made(second, order="wavefront", window_frames=9)
            resumed.load_state_dict(begun.state_dict())
            parts += [block.latents for block in resumed]
            assert torch.equal(torch.cat(parts, 1), whole)


def test_nothing_comes_from_the_host_in_a_replayed_visit(monkeypatch):
    """Index tensors made from Python lists inside the forward would be copies from the host in every capture."""
    rollout = made("eager", num_frames=None, order="wavefront", pairs=True, window_frames=6)
    blocks = iter(rollout)
    for _ in range(4):
        next(blocks)
    launches = list(rollout._executor.batched_forwards.values())
    tensor = torch.tensor

    def refuse(*args, **kwargs):
        caller = sys._getframe(1).f_globals["__name__"]
        assert not caller.startswith("hiar_model"), f"torch.tensor in {caller}"
        return tensor(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", refuse)
    with torch.no_grad():
        for launch in launches:
            launch.body()


@pytest.mark.parametrize("walk", WALKS[2:], ids=str)
def test_a_visit_reads_nothing_and_a_block_is_waited_for_once(walk, monkeypatch):
    """As on an accelerator: what would wait for the device is refused while groups are executed, else counted."""
    looks, numbers = [], Readback.numbers

    def counted(readback):
        looks.append(len(readback.host))
        return numbers(readback)

    monkeypatch.setattr(Readback, "numbers", counted)
    with hiar_kernels.prefer("reference"):
        rollout = made("recorded", num_frames=None, window_frames=6, **walk)
        rollout.warm_up()  # the one text is read when its keys are made: its padding is cut off
        rollout._executor.nan_guard.device = torch.device("cuda")  # only told: nothing runs there
        execute = rollout._executor.run

        def unread(group):
            with _Reads(), Recorder():
                return execute(group)

        monkeypatch.setattr(rollout._executor, "run", unread)
        blocks = iter(rollout)
        for n in range(1, 6):
            next(blocks)
            assert len(looks) == n
    assert sum(looks) >= 5 * 4, "the flag of every denoise visit"


@pytest.mark.parametrize("walk", [{"order": "wavefront"}, {"order": "stream", "pairs": True}], ids=str)
def test_the_host_draws_noise_before_it_waits(walk, monkeypatch):
    """Drawn between the wait for a block and the next task, it would be time in which the device idles."""
    seen, draw, read, prepare = [], KeyedNoise.__call__, Readback.numbers, CachedAttention.prepare_host

    def noted(name, function):
        return lambda *given, **more: seen.append((name, *given[1:])) or function(*given, **more)

    monkeypatch.setattr(KeyedNoise, "__call__", noted("draw", draw))
    monkeypatch.setattr(CachedAttention, "prepare_host", noted("visit", prepare))
    expected = latents(made("eager", window_frames=6, **walk))
    monkeypatch.setattr(Readback, "numbers", noted("wait", read))
    rollout = made("eager", window_frames=6, **walk)
    rollout._executor.nan_guard.device = torch.device("cuda")  # only told: looked at once a block
    seen.clear()
    assert torch.equal(latents(rollout), expected)
    draws = [one[1:] for one in seen if one[0] == "draw"]
    assert len(draws) == len(set(draws)) == 4 * 6, "each once"
    names = [name for name, *_ in seen]
    waits = [i for i, name in enumerate(names) if name == "wait" and "visit" in names[i:]]
    assert len(waits) == 5 and {names[i + 1] for i in waits} == {"visit"} and "draw" in {names[i - 1] for i in waits}


@pytest.mark.parametrize("executor", ["eager", "recorded"])
def test_a_rollout_that_is_dropped_gives_its_memory_back_at_once(executor):
    """Not when Python next looks for cycles: the rings of the next one may not fit beside these."""
    rollout = made(executor, order="wavefront", window_frames=6)
    latents(rollout)
    ring = weakref.ref(rollout._executor.cache.k[0])
    gc.collect()
    gc.disable()
    try:
        del rollout
        assert ring() is None
    finally:
        gc.enable()


def test_memory_of_latents_is_used_again():
    rollout = made("recorded", num_frames=None, order="wavefront", window_frames=6)
    blocks, places = iter(rollout), set()
    for n in range(12):
        block = next(blocks)
        held = list(rollout._executor.latents.values()) + [
            x for free in rollout._executor.free_buffers.values() for x in free
        ]
        places.add(len(held))
        assert block.latents.data_ptr() not in {x.data_ptr() for x in held}, "a finished block belongs to the caller"
        if n == 5:
            places.clear()
    assert len(places) == 1


# The stand-in


def test_a_recording_runs_on_the_same_memory():
    x, out = torch.arange(4.0), torch.zeros(4)
    python = [2.0]

    def run() -> None:
        y = (x.view(2, 2) * python[0]).t()
        out.copy_(y.reshape(4))
        x.add_(1)

    recording = Recorder.capture(run)
    assert x.tolist() == [1, 2, 3, 4] and out.tolist() == [0, 4, 2, 6]
    python[0] = 100.0  # frozen: a graph knows no Python
    recording.replay()
    assert x.tolist() == [2, 3, 4, 5] and out.tolist() == [2, 6, 4, 8]


@pytest.mark.parametrize("read", [lambda x: x.item(), lambda x: x.nonzero(), lambda x: bool(x), lambda x: x.tolist()])
def test_reading_on_the_host_is_refused(read):
    with pytest.raises(RuntimeError, match=r"^[\w:]+ reads a tensor on the host, which a captured graph cannot do"):
        Recorder.capture(lambda: read(torch.ones(1)))


def test_without_a_layout_a_library_cannot_be_captured():
    mask = hiar_kernels.BlockCausal(1, 1)
    q = torch.randn(1, 2, 1, 4)
    ids = torch.tensor([[0, 1]])
    with pytest.raises(RuntimeError, match="reads a tensor on the host"):
        Recorder.capture(lambda: hiar_kernels.attention(q, q, q, mask=mask, q_frames=ids, kv_frames=ids, impl="sdpa"))


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="needs a CUDA device, the model is on cpu"):
        made("graph")
    with pytest.raises(ValueError, match="executor must be one of eager, graph, .*got 'fast'"):
        made("fast")


def test_experts_have_graphs_of_their_own():
    experts = [make_model(s) for s in range(2)] * 2
    with hiar_kernels.prefer("reference"):
        options = {"model": experts, "order": "step_first", "num_frames": 15, "window_frames": 6}
        assert torch.equal(run(executor="recorded", **options), run(**options))


@pytest.mark.parametrize(
    ("walk", "impl"),
    [*((walk, "reference") for walk in WALKS[::2]), *((walk, "sdpa") for walk in WALKS[1:7:2])],
    ids=str,
)
def test_after_warming_up_nothing_is_captured(walk, impl):
    options = {"num_frames": 21, "window_frames": 8, "sink_frames": 1, **walk}
    with hiar_kernels.prefer(impl):
        warm, cold = made("recorded", **options), made("recorded", **options)
        kinds = warm.warm_up()
        assert kinds == warm._executor.counters.captures
        found = latents(warm)
        assert warm._executor.counters.captures == kinds
        assert torch.equal(found, latents(cold))
        assert cold._executor.counters.captures <= kinds
    with pytest.raises(ValueError, match="warm_up must come before the first block"):
        warm.warm_up()


def test_warming_up_is_bounded_for_an_endless_video():
    rollout = made("recorded", num_frames=None, order="stream", window_frames=6)
    kinds = rollout.warm_up()
    blocks = iter(rollout)
    for _ in range(9):
        next(blocks)
    assert rollout._executor.counters.captures == kinds


def storages_of(thing: object, visited: set[int]) -> set[int]:
    """Storages of the tensors that an object holds, but not those that only functions, classes or modules hold."""
    if id(thing) in visited or isinstance(thing, type | types.ModuleType | types.FunctionType):
        return set()
    visited.add(id(thing))
    found = {thing.untyped_storage().data_ptr()} if isinstance(thing, torch.Tensor) else set()
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    return found.union(*(storages_of(x, visited) for x in (*inner, *getattr(thing, "__dict__", {}).values())))


@pytest.mark.parametrize("options", [{}, {"fuse_cache_denoise": True}], ids=str)
def test_what_a_graph_reads_is_owned_by_its_forward(options):
    """A cache of limited size would free it, after enough other entries, while the graph still reads it."""
    with hiar_kernels.prefer("reference"):
        for _ in range(2):  # the second finds what the first left in caches
            rollout = made("recorded", model=MODEL, order="wavefront", window_frames=6, **options)
            latents(rollout)
    picks = 0
    for forward in rollout._executor.batched_forwards.values():
        picks += forward.selection is not None and len(forward.selection.runs()) > 1
        owned = storages_of(forward, {id(forward.captured)})  # a graph itself keeps nothing alive
        for function, args, kwargs, result in forward.captured.calls:
            for x in () if function is torch.ops.aten.lift_fresh.default else tree_flatten((args, kwargs))[0]:
                if isinstance(x, torch.Tensor) and x.numel():
                    assert x.untyped_storage().data_ptr() in owned, f"{function} reads {list(x.shape)} of nobody"
            owned |= {x.untyped_storage().data_ptr() for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)}
    assert picks or options, "no forward selects batch items that are no neighbours"


def test_tables_that_kernels_keep_are_never_evicted():
    """A graph that was captured long ago still reads its own."""
    first = turns_of(8, 1e4, torch.device("cpu"))
    for theta in range(2, 200):
        turns_of(8, float(theta), torch.device("cpu"))
    assert turns_of(8, 1e4, torch.device("cpu")) is first
