"""The tasks of a rollout: geometry, dependencies, task orders and their checker."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from random import Random

import pytest
from calls import count_calls
from hypothesis import given, settings
from hypothesis import strategies as st

from hiar_model.schedule.plan import (
    Group,
    Plan,
    Task,
    cache,
    check,
    denoise,
    dependencies,
    forwards,
    rank_order,
    windows_per_step,
)

pytestmark = pytest.mark.cpu

MATCHED = ("step_first", "stream", "wavefront")


# The oracle: frame by frame from the definitions; it shares no formula with the module.


def frames_of(plan: Plan, block: int) -> list[int]:
    """The frames of a block, by laying blocks end to end."""
    short = plan.prefix_frames % plan.frames_per_block
    sizes = [short] if short else []
    while len(sizes) <= block:
        sizes.append(plan.frames_per_block)
    start = sum(sizes[:block])
    return list(range(start, start + sizes[block]))


def oracle_sees(plan: Plan, step: int, n: int, m: int) -> bool:
    end = frames_of(plan, n)[-1] + 1
    window, sink = plan.window_frames[step], plan.sink_frames
    return any(j < end and (window is None or j >= end - (window - sink) or j < sink) for j in frames_of(plan, m))


def oracle_needs(plan: Plan, task: Task) -> set[Task]:
    s, n = task.step, task.block
    in_prefix = frames_of(plan, n)[0] < plan.prefix_frames
    needs: set[Task] = set()
    for m in range(n):
        if oracle_sees(plan, s, n, m):
            shared = plan.kv_source == "next_step" and frames_of(plan, m)[0] >= plan.prefix_frames
            if plan.order == "block_first":
                needs.add(Task("cache", plan.steps - 1, m))
            elif shared and s + 1 < plan.steps:
                needs.add(Task("denoise", s + 1, m))
            else:
                needs.add(Task("cache", s, m))
    if task.kind == "denoise" and s:
        needs.add(Task("denoise", s - 1, n))
    if task.kind == "cache" and not in_prefix:
        needs.add(Task("denoise", s, n))
    return needs


def oracle_tasks(plan: Plan, num_blocks: int) -> set[Task]:
    """The denoise tasks of all generated blocks, and everything they depend on."""
    generated = [n for n in range(num_blocks) if frames_of(plan, n)[0] >= plan.prefix_frames]
    todo = [Task("denoise", s, n) for s in range(plan.steps) for n in generated]
    tasks = set(todo)
    while todo:
        fresh = oracle_needs(plan, todo.pop()) - tasks
        tasks |= fresh
        todo += fresh
    return tasks


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    steps, fpb = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    sink = draw(st.integers(0, 5))
    window = st.none() | st.integers(sink + fpb, sink + 5 * fpb)
    windows = draw(window.map(lambda w: (w,) * steps) | st.tuples(*[window] * steps))
    order = draw(st.sampled_from((*MATCHED, "block_first")))
    source = draw(st.sampled_from(("own", "next_step"))) if order in ("stream", "wavefront") else "own"
    fused = draw(st.booleans()) if order != "block_first" and source == "own" else False
    return Plan(steps, order, fpb, draw(st.integers(0, 2 * fpb + 1)), windows, sink, source, fused)


BLOCKS = st.integers(0, 7)
fast = settings(max_examples=300, deadline=None)


def early(groups: Iterable[Group], block: int) -> list[list[list[Task]]]:
    """The tasks of the blocks before `block`, without items and groups that are then empty."""
    tasks = [[[task for task in item if task.block < block] for item in group] for group in groups]
    return [items for items in ([item for item in group if item] for group in tasks) if items]


# Geometry and graph.


@fast
@given(plans(), BLOCKS)
def test_geometry_and_graph_follow_the_definition(plan: Plan, n: int) -> None:
    assert list(range(*plan.block_frames(n))) == frames_of(plan, n)
    assert plan.first_block_frames == len(frames_of(plan, 0))
    assert all(plan.block_of(frame) == n for frame in frames_of(plan, n))
    assert sum(len(frames_of(plan, m)) for m in range(plan.prefix_blocks)) == plan.prefix_frames
    for step in range(plan.steps):
        assert [plan.sees(step, n, m) for m in range(n + 3)] == [oracle_sees(plan, step, n, m) for m in range(n + 3)]
        assert plan.seen(step, n) == [m for m in range(n) if oracle_sees(plan, step, n, m)]
        end, window, sink = frames_of(plan, n)[-1] + 1, plan.window_frames[step], plan.sink_frames
        visible = [j for j in range(end) if window is None or j >= end - (window - sink) or j < sink]
        assert plan.visible_frames(step, n) == len(visible)
        for task in (denoise(step, n), cache(step, n)):
            assert dependencies(plan, task) == oracle_needs(plan, task)


def test_short_first_block() -> None:
    plan = Plan(4, "stream", 3, prefix_frames=4)
    assert [plan.block_frames(n) for n in range(4)] == [(0, 1), (1, 4), (4, 7), (7, 10)]
    assert (plan.prefix_blocks, plan.first_block_frames) == (2, 1)


def test_window_is_counted_in_frames() -> None:
    plan = Plan(2, "stream", 3, window_frames=(7, None), sink_frames=1)
    # block 3 ends at frame 11: it sees 6..11 and frame 0, so not block 1 (frames 3, 4, 5)
    assert [plan.sees(0, 3, m) for m in range(5)] == [True, False, True, True, False]
    assert plan.seen(1, 3) == [0, 1, 2]
    plan = Plan(1, "stream", 3, window_frames=(8,), sink_frames=1)
    assert plan.seen(0, 3) == [0, 1, 2]  # one frame more: frame 5 of block 1


def test_caches() -> None:
    for order, caches, index in (("step_first", 1, 0), ("stream", 4, 2), ("wavefront", 4, 2), ("block_first", 1, 0)):
        plan = Plan(4, order, 3)
        assert (plan.caches, plan.cache_index(2)) == (caches, index)
        assert plan.graph == ("clean" if order == "block_first" else "matched")


# Task orders.


@fast
@given(plans(), BLOCKS)
def test_orders_are_legal_and_complete(plan: Plan, num_blocks: int) -> None:
    if num_blocks < plan.prefix_blocks:
        with pytest.raises(ValueError, match="num_blocks"):
            plan.groups(num_blocks)
        return
    groups = list(plan.groups(num_blocks))
    check(plan, groups, num_blocks)
    tasks = [task for group in groups for item in group for task in item]
    assert forwards(groups) == len(tasks) == len(set(tasks))
    assert set(tasks) == oracle_tasks(plan, num_blocks)
    assert all(group and all(item for item in group) for group in groups)
    for group in groups:
        steps = [item[0].step for item in group]
        assert steps == sorted(set(steps))
    if plan.fuse_cache_denoise and num_blocks:
        alone = {item[0] for group in groups for item in group if len(item) == 1 and item[0].kind == "cache"}
        assert all(task.block < plan.prefix_blocks - 1 for task in alone)


@fast
@given(plans(), BLOCKS, st.integers(1, 4))
def test_endless_orders_start_like_finite_ones(plan: Plan, num_blocks: int, more: int) -> None:
    num_blocks += plan.prefix_blocks + 1
    if plan.order == "step_first":
        with pytest.raises(ValueError, match="endless"):
            plan.groups(None)
        return
    enough = plan.steps * 3 * (num_blocks + 2 * plan.steps)  # groups until all of these blocks are done
    last = num_blocks - 1  # its cache tasks depend on whether the video goes on
    endless = early(islice(plan.groups(None), enough), last)
    assert endless == early(plan.groups(num_blocks), last)
    assert endless == early(plan.groups(num_blocks + more), last)


@pytest.mark.parametrize("order", ["stream", "wavefront", "block_first"])
def test_endless_orders_stay_cheap(order: str) -> None:
    plan = Plan(4, order, 3, prefix_frames=4, window_frames=(6, 9, 12, 21), sink_frames=2)
    half, whole = (count_calls(lambda n=number: next(islice(plan.groups(None), n, None))) for number in (5_000, 10_000))
    assert whole < 2.1 * half
    assert next(islice(plan.groups(None), 10_000, None))[0][0].block > 1_000
    # Step 2, the sink in blocks 0 and 1, 16 frames back.
    assert len(dependencies(plan, denoise(3, 10**12))) == 1 + 2 + 6


def test_the_orders_written_out() -> None:
    d, c = denoise, cache
    stream = Plan(2, "stream", 1)
    assert list(stream.groups(2)) == [
        ((d(0, 0),),),
        ((d(1, 0),),),
        ((c(0, 0),), (c(1, 0),)),
        ((d(0, 1),),),
        ((d(1, 1),),),
    ]
    wavefront = Plan(2, "wavefront", 1)
    assert list(wavefront.groups(2)) == [
        ((d(0, 0),),),
        ((c(0, 0),), (d(1, 0),)),
        ((d(0, 1),), (c(1, 0),)),
        ((d(1, 1),),),
    ]
    fused = Plan(2, "wavefront", 1, fuse_cache_denoise=True)
    assert list(fused.groups(2)) == [
        ((d(0, 0),),),
        ((c(0, 0), d(0, 1)), (d(1, 0),)),
        ((c(1, 0), d(1, 1)),),
    ]
    shared = Plan(2, "stream", 1, kv_source="next_step")
    assert list(shared.groups(2)) == [((d(0, 0),),), ((d(1, 0),),), ((c(1, 0),),), ((d(0, 1),),), ((d(1, 1),),)]
    prefixed = Plan(2, "stream", 2, prefix_frames=3, fuse_cache_denoise=True)
    assert list(prefixed.groups(3)) == [
        ((c(0, 0),), (c(1, 0),)),
        ((c(0, 1), d(0, 2)),),
        ((c(1, 1), d(1, 2)),),
    ]
    assert list(Plan(2, "step_first", 1, prefix_frames=1).groups(2)) == [
        ((c(0, 0),),),
        ((d(0, 1),),),
        ((c(1, 0),),),
        ((d(1, 1),),),
    ]
    assert rank_order(((d(0, 1),), (c(1, 0),), (d(3, 0),))) == [(d(3, 0),), (c(1, 0),), (d(0, 1),)]


def test_first_block_comes_after_one_denoise_task_per_step() -> None:
    for fused in (False, True):
        first = islice(Plan(4, "stream", 3, fuse_cache_denoise=fused).groups(None), 4)
        assert list(first) == [((denoise(s, 0),),) for s in range(4)]


def test_needless_cache_tasks_are_dropped() -> None:
    for order in (*MATCHED, "block_first"):
        tight = Plan(3, order, 2, window_frames=(2, 2, 2))
        assert forwards(tight.groups(5)) == 3 * 5
        only_sink = Plan(3, order, 2, window_frames=(4, 4, 4), sink_frames=2)
        assert forwards(only_sink.groups(5)) == 3 * 5 + (1 if order == "block_first" else 3)
        prefix_only = Plan(3, order, 2, prefix_frames=3)
        assert list(prefix_only.groups(2)) == []
    # the clean cache is read by every step's window, but inside the prefix only by the last step's
    clean = Plan(2, "block_first", 2, prefix_frames=4, window_frames=(None, 2))
    check(clean, list(clean.groups(3)), 3)
    clean = Plan(2, "block_first", 2, prefix_frames=4, window_frames=(3, 2))
    assert list(clean.groups(3)) == [((cache(1, 1),),), ((denoise(0, 2),),), ((denoise(1, 2),),)]


# The checker.


def refused(plan: Plan, groups: list[Group], num_blocks: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(plan, groups, num_blocks)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_check_names_the_first_fault() -> None:
    d, c = denoise, cache
    plan = Plan(2, "stream", 1)
    good = list(plan.groups(2))
    refused(plan, [good[1], good[0], *good[2:]], 2, "denoise(1, 0) needs denoise(0, 0)")
    refused(plan, good[:2] + good[3:], 2, "denoise(0, 1) needs cache(0, 0)")
    refused(plan, [good[0], good[0], *good[1:]], 2, "denoise(0, 0) comes twice")
    refused(plan, good[:-1], 2, "denoise(1, 1) is missing")
    refused(plan, [*good, ((c(0, 1),),)], 2, "cache(0, 1) is needless")
    refused(plan, [((d(0, 0),), (d(1, 0),)), *good[2:]], 2, "denoise(1, 0) needs denoise(0, 0)")
    refused(plan, [*good, ((d(2, 0),),)], 2, "denoise(2, 0): step must be 0 to 1, got 2")
    refused(plan, [*good, ((d(0, 2),),)], 2, "denoise(0, 2): block must be 0 to 1, got 2")
    refused(plan, [((d(0, 0), d(0, 1)),)], 2, "(denoise(0, 0), denoise(0, 1)) is no batch item")
    refused(plan, [((d(0, 0), c(0, 0)),)], 2, "is no batch item")
    refused(plan, [((),)], 2, "is no batch item")
    refused(plan, [((Task("look", 0, 0),),)], 2, "look(0, 0): kind must be denoise or cache, got 'look'")  # type: ignore[arg-type]
    refused(
        Plan(2, "stream", 1, prefix_frames=1),
        [((d(0, 0),),)],
        2,
        "denoise(0, 0): denoised blocks start at 1, after the prefix; got 0",
    )


def test_check_guards_the_memory_of_the_caches() -> None:
    d, c = denoise, cache
    tight = Plan(2, "stream", 1, window_frames=(1, 1))  # no block needs another, yet a step has one cache
    refused(tight, [((d(0, 0),), (d(0, 1),)), ((d(1, 0),),), ((d(1, 1),),)], 2, "both use cache 0")
    refused(tight, [((d(0, 1),),), ((d(0, 0),),)], 2, "denoise(0, 0) comes too late")
    one = Plan(2, "step_first", 1)
    groups: list[Group] = [((d(0, 0),),), ((c(0, 0),),), ((d(1, 0),),), ((d(0, 1),),)]
    refused(one, groups, 2, "denoise(0, 1) comes too late: cache 0 already holds later frames")
    refused(one, list(Plan(2, "wavefront", 1).groups(2)), 2, "both use cache 0")
    # denoise(1, .) writes cache 0 too
    shared = Plan(3, "stream", 1, window_frames=(1, 1, 1), kv_source="next_step")
    refused(shared, [((d(0, 0),),), ((d(0, 1),), (d(1, 0),))], 2, "both use cache 0")


@fast
@given(plans(), st.integers(1, 6), st.randoms())
def test_check_refuses_broken_orders(plan: Plan, generated: int, random: Random) -> None:
    num_blocks = plan.prefix_blocks + generated
    groups = list(plan.groups(num_blocks))
    spot = random.randrange(len(groups))
    with pytest.raises(ValueError):  # a group is missing
        check(plan, groups[:spot] + groups[spot + 1 :], num_blocks)
    with pytest.raises(ValueError, match="twice"):
        check(plan, [*groups[: spot + 1], groups[spot], *groups[spot + 1 :]], num_blocks)
    swappable = [
        i
        for i in range(len(groups) - 1)
        if any(oracle_needs(plan, v) & {u for item in groups[i] for u in item} for item in groups[i + 1] for v in item)
    ]
    if swappable:
        i = random.choice(swappable)
        with pytest.raises(ValueError, match="needs"):
            check(plan, [*groups[:i], groups[i + 1], groups[i], *groups[i + 2 :]], num_blocks)
    caches = sorted(task for group in groups for item in group for task in item if task.kind == "cache")
    if caches:
        gone = random.choice(caches)
        broken = [tuple(tuple(v for v in item if v != gone) for item in group if item != (gone,)) for group in groups]
        with pytest.raises(ValueError, match="needs"):
            check(plan, broken, num_blocks)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("blocks", [1, 2, 7, 27])
def test_forwards(steps: int, blocks: int) -> None:
    assert forwards(Plan(steps, "block_first", 3).groups(blocks)) == (steps + 1) * blocks - 1
    for order in MATCHED:
        for fused in (False, True):
            assert (
                forwards(Plan(steps, order, 3, fuse_cache_denoise=fused).groups(blocks)) == 2 * steps * blocks - steps
            )


def test_forwards_per_block() -> None:
    for plan, more in ((Plan(4, "stream", 3), 8), (Plan(4, "stream", 3, kv_source="next_step"), 5)):
        assert forwards(plan.groups(28)) - forwards(plan.groups(27)) == more


# Bad input: one line that names the wrong thing and the legal values.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.0}, "steps must be a whole number of at least 1, got 2.0"),
        ({"frames_per_block": 0}, "frames_per_block must be a whole number of at least 1, got 0"),
        ({"frames_per_block": True}, "frames_per_block must be a whole number of at least 1, got True"),
        ({"prefix_frames": -1}, "prefix_frames must be a whole number of at least 0, got -1"),
        ({"sink_frames": -1}, "sink_frames must be a whole number of at least 0, got -1"),
        ({"order": "spiral"}, "order must be one of step_first, stream, wavefront, block_first, got 'spiral'"),
        ({"kv_source": "none"}, "kv_source must be one of own, next_step, got 'none'"),
        ({"window_frames": (4, 4), "sink_frames": 2}, "window_frames must be a whole number of at least 5"),
        ({"window_frames": (4,)}, "window_frames must be None, one number of frames, or one per step (2), got (4,)"),
        ({"window_frames": (4, "x")}, "window_frames must be a whole number of at least 3"),
        ({"order": "step_first", "kv_source": "next_step"}, "use stream or wavefront"),
        ({"order": "block_first", "kv_source": "next_step"}, "use stream or wavefront"),
        (
            {"order": "block_first", "fuse_cache_denoise": True},
            "fuse_cache_denoise=True is impossible with order='block_first'",
        ),
        (
            {"kv_source": "next_step", "fuse_cache_denoise": True},
            "fuse_cache_denoise=True is impossible with kv_source='next_step'",
        ),
    ],
)
def test_bad_plans(change: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Plan(**{"steps": 2, "order": "stream", "frames_per_block": 3, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_lengths() -> None:
    plan = Plan(2, "stream", 3, prefix_frames=4)
    for bad in (-1, 1, 2.5):
        with pytest.raises(ValueError, match=r"num_blocks must be a whole number of at least 2 .*got"):
            plan.groups(bad)  # type: ignore[arg-type]


def test_windows_per_step() -> None:
    assert windows_per_step(None, 3) == (None, None, None)
    assert windows_per_step(21, 2) == (21, 21)
    assert windows_per_step([6, None], 2) == (6, None)
    assert Plan(2, "stream", 3).window_frames == (None, None)
    for bad in ((), (1, 2, 3), {6, 9}, "69", "6,9", 6.0):
        with pytest.raises(ValueError, match="window_frames"):
            windows_per_step(bad, 2)  # type: ignore[arg-type]
