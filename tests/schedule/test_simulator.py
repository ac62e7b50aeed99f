"""The simulator: what task orders cost on one rank and on pipelines, its costs, and its search for a split."""

from __future__ import annotations

import json
import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from calls import count_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from hiar_model.config import WanConfig
from hiar_model.schedule.costs import (
    LINKS,
    CostCurve,
    Costs,
    Geometry,
    Link,
    Message,
    exchanged_bytes,
    head_parallel,
    measured,
    roofline,
    task_flop,
    unit_costs,
)
from hiar_model.schedule.plan import Plan, cache, denoise, dependencies, forwards
from hiar_model.schedule.simulator import Simulation, Timeline, simulate

pytestmark = pytest.mark.cpu

SMALL, LARGE = (WanConfig.from_name(f"wan2.1-t2v-{size}") for size in ("1.3b", "14b"))


def windowed(steps: int, order: str = "stream", **options: Any) -> Plan:
    """A plan of 3-frame blocks whose tasks stay cheap however long the video is."""
    return Plan(steps, order, 3, window_frames=(21,) * steps, **options)


def makespan(plan: Plan, num_blocks: int, ranks: int, **times: float) -> Timeline:
    """The timeline at unit costs on so many ranks, with the best split."""
    return simulate(plan, num_blocks, ranks, unit_costs(**times))


# The figures of the design.


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("blocks", [1, 2, 7, 27])
def test_one_rank_per_step(steps: int, blocks: int) -> None:
    for order in ("step_first", "stream", "wavefront"):
        assert makespan(Plan(steps, order, 3), blocks, steps).time == 2 * blocks + steps - 2
        assert makespan(Plan(steps, order, 3), blocks, 1).time == 2 * steps * blocks - steps
    assert makespan(Plan(steps, "block_first", 3), blocks, 1).time == (steps + 1) * blocks - 1
    if blocks >= 2:
        for order in ("stream", "wavefront"):
            fused = makespan(Plan(steps, order, 3, fuse_cache_denoise=True), blocks, steps)
            assert fused.time == 2 * blocks + 2 * steps - 3


@pytest.mark.parametrize("order", ["stream", "wavefront"])
def test_four_steps(order: str) -> None:
    own, shared = Plan(4, order, 3), Plan(4, order, 3, kv_source="next_step")
    spans = [makespan(own, 27, ranks) for ranks in (1, 2, 3, 4)]
    assert [span.time for span in spans] == [212, 108, 108, 56]
    assert [span.split for span in spans] == [(4,), (2, 2), (2, 1, 1), (1, 1, 1, 1)]
    assert [makespan(shared, 27, ranks).time for ranks in (1, 2, 3)] == [134, 82, 56]


@pytest.mark.parametrize(("blocks", "speedup"), [(7, 2.1), (27, 2.4), (2000, 2.5)])
def test_speedup_of_four_ranks_over_block_first(blocks: int, speedup: float) -> None:
    block_first = makespan(windowed(4, "block_first"), blocks, 1).time
    assert round(block_first / makespan(windowed(4), blocks, 4).time, 1) == speedup


def test_several_steps_per_rank_want_stream() -> None:
    """Diagonals make a rank of many steps start all blocks abreast: the next rank waits for its first latents."""
    assert simulate(windowed(50), 7, 2).time == 350  # all the work, shared evenly
    assert simulate(windowed(50, "wavefront"), 7, 2).time == 596


@pytest.mark.parametrize(
    ("order", "options", "ranks", "interval", "delay"),
    [
        ("block_first", {}, 1, 5, 9),
        ("stream", {}, 1, 8, 12),
        ("stream", {}, 2, 4, 8),
        ("stream", {}, 4, 2, 6),
        ("stream", {"fuse_cache_denoise": True}, 4, 2, 10),
        ("step_first", {}, 1, None, None),
    ],
)
def test_steady_interval_and_prompt_delay(
    order: str, options: dict[str, Any], ranks: int, interval: float | None, delay: float | None
) -> None:
    timeline = simulate(windowed(4, order, **options), 40, ranks)
    assert (timeline.steady_interval, timeline.prompt_delay) == (interval, delay)
    assert timeline.first_block == (4 if order != "step_first" else 3 * 2 * 40 - 3 + 1)


def test_a_short_video_has_no_steady_state() -> None:
    assert simulate(windowed(4), 7, 4).steady_interval is None
    growing = Costs(CostCurve(((0, 1), (3, 2))), CostCurve(((0, 1), (3, 2))))
    assert simulate(Plan(4, "stream", 3), 40, 1, growing).steady_interval is None  # its window grows for ever
    assert simulate(windowed(4), 40, 1, growing).steady_interval == 8 * 8


# Transfers, decoding, batches, flow control.


def test_sending_takes_time() -> None:
    blocks = 9
    for steps in (2, 4):  # latents cross once per pair of neighbours, on the way through the pipe
        span = makespan(Plan(steps, "wavefront", 3), blocks, steps, send_latent=0.5)
        assert span.time == 2 * blocks + steps - 2 + 0.5 * (steps - 1)
    shared = Plan(2, "wavefront", 3, kv_source="next_step")  # a round trip of shared keys per block
    assert makespan(shared, blocks, 2, send_keys=0.25).time == 2 * blocks + 0.25 * (blocks - 1)
    both = makespan(shared, blocks, 2, send_latent=0.5, send_keys=0.25)
    assert both.time == 2 * blocks + 0.25 * (blocks - 1) + 0.5 * blocks
    assert makespan(Plan(4, "stream", 3), blocks, 1, send_latent=9, send_keys=9).time == 8 * blocks - 4
    assert makespan(Plan(4, "stream", 3), blocks, 1, denoise=2, cache=0.5).time == 4 * (2 * blocks + 0.5 * (blocks - 1))
    # the split matters: only step 0 reads keys, so steps 0 and 1 on one rank need no slow round trip
    shared = Plan(3, "stream", 3, window_frames=(None, 3, 3), kv_source="next_step")
    timeline = makespan(shared, 6, 2, send_keys=3)
    assert (timeline.time, timeline.split) == (13, (2, 1))
    # slow cache tasks, all on the last step, give its rank fewer steps
    windows = (3, 3, 3, None)  # only the last step has cache tasks
    assert makespan(Plan(4, "stream", 3, window_frames=windows), blocks, 2, cache=3).split == (3, 1)


def test_a_link_carries_one_message_at_a_time() -> None:
    unit = CostCurve(((0, 1),))
    slow = Costs(unit, unit, latents=Message(nbytes=10, busy=5, delay=1))
    timeline = simulate(windowed(2), 4, 2, slow)
    # Block 0 leaves rank 0 at 1, is through at 6 and there at 7; the link then takes block after block, 5 each.
    assert [timeline.finished[n] for n in range(4)] == [8, 13, 18, 23]
    assert timeline.bytes_sent == 4 * 10
    shared = Costs(unit, unit, latents=Message(nbytes=1), keys=Message(nbytes=100))
    timeline = simulate(windowed(4, kv_source="next_step"), 9, (1, 2, 1), shared)
    assert timeline.bytes_sent == 2 * 9 * 1 + 2 * 8 * 100  # nobody needs the keys of the last block


def test_decoding() -> None:
    costs = unit_costs(decode=3)
    assert simulate(windowed(4), 9, 1, costs, vae="last").time == 8 * 9 - 4 + 3 * 9
    last = simulate(windowed(4), 9, (1, 1, 1, 1), costs, vae="last")
    assert last.time == 3 + 9 * (2 + 3) - 1 and last.first_block == 4 + 3 and last.ranks == 4
    own = simulate(windowed(4), 9, (1, 1, 1, 1), costs, vae="own")
    assert own.time == 4 + 9 * 3 and own.ranks == 5 and own.split == (1, 1, 1, 1)
    assert [event.rank for event in own.events if event.decoded == 8] == [4]
    # the rank that decodes holds fewer steps
    assert simulate(windowed(4), 40, 2, unit_costs(decode=4), vae="last").split == (3, 1)


def test_batches() -> None:
    unit = CostCurve(((0, 1),))
    costs = Costs(unit, unit, batch=(1, 0.75))
    timeline = simulate(Plan(2, "wavefront", 1), 2, 1, costs, batch=True)  # d | c d | d c | d
    assert timeline.time == 1 + 1.5 + 1.5 + 1
    assert [len(event.items) for event in timeline.events] == [1, 2, 2, 1]
    assert simulate(Plan(4, "wavefront", 1), 9, 1, costs).time == 8 * 9 - 4
    fused = Costs(unit, unit, fused=0.75)
    assert simulate(Plan(2, "stream", 1, fuse_cache_denoise=True), 2, 1, fused).time == 2 + 2 * 1.5


def test_flow_control() -> None:
    fast_first = Costs(tuple(CostCurve(((0, t),)) for t in (1, 3)), CostCurve(((0, 1),)))
    free = simulate(windowed(2), 40, 2, fast_first)
    limited = simulate(windowed(2), 40, 2, fast_first, in_flight=3)
    assert free.time == limited.time and free.steady_interval == limited.steady_interval == 4
    assert limited.prompt_delay == (3 + 1) * 4 < free.prompt_delay  # at worst behind a start, so one more
    for block, started in limited.started.items():
        assert block < 3 or started >= limited.finished[block - 3]
    alone = simulate(windowed(4), 40, 4, in_flight=1)
    assert alone.steady_interval == 4  # one block at a time: no pipeline left
    assert all(alone.started[block] >= alone.finished[block - 1] for block in range(1, 40))


def test_a_prefix_is_no_part_of_the_steady_state() -> None:
    plan = Plan(2, "stream", 3, prefix_frames=9)
    assert simulate(plan, 12).steady_interval == 4
    nothing = simulate(plan, plan.prefix_blocks)
    assert nothing.time == 0 and nothing.utilisation == (0.0,) and nothing.steady_interval is None


def test_a_search_that_is_cut_short_proves_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is a bound of every split, and the split is one that was simulated."""
    costs = Costs(tuple(CostCurve(((0, t),)) for t in (5, 2, 2, 6, 5)), CostCurve(((0, 4),)), latents=Message(1, 0, 0))
    plan = Plan(5, "stream", 3, kv_source="next_step")
    best = simulate(plan, 5, 3, costs)
    assert best.time == best.lower_bound == 64
    monkeypatch.setattr("hiar_model.schedule.simulator.MOST_TRIALS", 0)
    short = simulate(plan, 5, 3, costs)
    assert (short.time, short.lower_bound) == (64, 56)


# What holds of every simulation.


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    steps, fpb = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    sink = draw(st.integers(0, 3))
    windows = draw(st.tuples(*[st.none() | st.integers(sink + fpb, sink + 4 * fpb)] * steps))
    order = draw(st.sampled_from(("step_first", "stream", "wavefront")))
    source = draw(st.sampled_from(("own", "next_step"))) if order != "step_first" else "own"
    fused = draw(st.booleans()) if source == "own" else False
    return Plan(steps, order, fpb, draw(st.integers(0, fpb + 1)), windows, sink, source, fused)


@st.composite
def cost_sets(draw: st.DrawFn) -> Costs:
    def number() -> float:
        return draw(st.integers(0, 8)) / 4

    curves = [CostCurve(((0, number() + 0.25), (3, number() + 2.25))) for _ in range(2)]
    messages = [Message(1, number(), number()) for _ in range(2)]
    return Costs(*curves, fused=0.75, batch=(1, 0.5), decode=number(), latents=messages[0], keys=messages[1])


VAE = st.sampled_from(("none", "last", "own"))


def all_splits(steps: int, ranks: int) -> list[tuple[int, ...]]:
    cuts = ((0, *c, steps) for c in combinations(range(1, steps), ranks - 1))
    return [tuple(b - a for a, b in pairwise(c)) for c in cuts]


def verify(timeline: Timeline, plan: Plan, costs: Costs, num_blocks: int) -> None:
    """Every task once, in its rank's own order, behind all it needs and all that has to be sent."""
    owner = [rank for rank, steps in enumerate(timeline.split) for _ in range(steps)]
    event_of = {v: event for event in timeline.events for item in event.items for v in item}
    assert sum(len(item) for event in timeline.events for item in event.items) == len(event_of)
    assert len(event_of) == forwards(plan.groups(num_blocks))
    free = [0.0] * timeline.ranks
    for event in timeline.events:
        assert event.start >= free[event.rank] and event.end >= event.start
        free[event.rank] = event.end
        for task in (v for item in event.items for v in item):
            for need in dependencies(plan, task):
                if event_of[need] is event:
                    continue
                wait = 0.0
                if owner[need.step] != event.rank:
                    message = costs.latents if need.step < task.step else costs.keys
                    wait = message.busy + message.delay
                assert event.start >= event_of[need].end + wait - 1e-9
            assert task.step >= len(owner) or owner[task.step] == event.rank or len(event.items) > 1
    for event in timeline.events:
        if event.decoded is not None:
            assert event.start >= event_of[denoise(plan.steps - 1, event.decoded)].end - 1e-9


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(1, 4), cost_sets(), VAE, st.data())
def test_timelines_are_legal(plan: Plan, generated: int, costs: Costs, vae: str, data: st.DataObject) -> None:
    num_blocks = plan.prefix_blocks + generated
    ranks = data.draw(st.integers(1, plan.steps))
    split = data.draw(st.sampled_from(all_splits(plan.steps, ranks)))
    verify(simulate(plan, num_blocks, split, costs, vae=vae), plan, costs, num_blocks)
    verify(simulate(plan, num_blocks, 1, costs, vae=vae, batch=True), plan, costs, num_blocks)


@settings(max_examples=80, deadline=None)
@given(plans(), st.integers(1, 4), cost_sets(), VAE)
def test_the_split_found_is_the_best(plan: Plan, generated: int, costs: Costs, vae: str) -> None:
    num_blocks = plan.prefix_blocks + generated
    simulation = Simulation(plan, num_blocks, costs, vae=vae)
    for ranks in range(1, plan.steps + 1):
        timeline = simulation.timeline(ranks)
        times = [simulation.timeline(split).time for split in all_splits(plan.steps, ranks)]
        assert timeline.time == pytest.approx(min(times), rel=1e-8)
        assert timeline.lower_bound <= min(times) * (1 + 1e-8)


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 4))
def test_more_ranks_share_the_work(plan: Plan, generated: int) -> None:
    num_blocks = plan.prefix_blocks + generated
    total = forwards(plan.groups(num_blocks))
    for ranks in range(1, min(plan.steps, 3) + 1):
        timeline = simulate(plan, num_blocks, ranks)
        assert sum(timeline.split) == plan.steps and len(timeline.split) == ranks
        assert total / ranks <= timeline.time <= total
        assert sum(timeline.utilisation) == pytest.approx(total / timeline.time)


def test_many_steps_are_searched_and_proven() -> None:
    """Three million calls, not one for each of two thousand million splits."""
    assert count_calls(_many_steps) < 6_000_000


def _many_steps() -> None:
    timeline = simulate(windowed(50), 200, 10)
    assert timeline.time == timeline.lower_bound == 5 * 2 * 200 - 5 + 45
    assert timeline.split == (5,) * 10
    uneven = simulate(windowed(50), 81, 7)
    assert uneven.time == uneven.lower_bound and uneven.split == (8, 8, 8, 8, 8, 8, 2)
    decoding = simulate(windowed(50), 60, 10, unit_costs(decode=4), vae="last")
    assert decoding.time == decoding.lower_bound and decoding.split[-1] < 5


# Costs.


def test_curves() -> None:
    curve = CostCurve(((3, 1), (6, 2), (21, 5)))
    assert [curve(x) for x in (0, 3, 4.5, 6, 11, 21, 26)] == [0, 1, 1.5, 2, 3, 5, 6]
    assert CostCurve(((3, 7),))(99) == 7
    assert curve.scaled(2, 1)(4.5) == 4
    for bad in ((), ((3, 1), (3, 2)), ((6, 1), (3, 2)), ((3, -1),)):
        with pytest.raises(ValueError, match="a cost curve needs"):
            CostCurve(bad)


def test_work_and_bytes_of_the_published_sizes() -> None:
    g = Geometry()
    tokens = 3 * g.frame_tokens(SMALL)
    assert tokens == 4680
    assert task_flop(SMALL, tokens, 7 * tokens) == pytest.approx(40.41e12, rel=1e-3)
    assert task_flop(SMALL, tokens, 0) == pytest.approx(12.15e12, rel=1e-3)
    assert g.latent_bytes(SMALL) == 599_040
    assert g.key_bytes(SMALL) == 862_617_600  # of one step
    assert 5 * exchanged_bytes(SMALL, g, 4) == pytest.approx(1.617e9, rel=1e-3)  # per GPU and block
    # Each of R ranks has T/R tokens of width d, keeps 1/R of each tensor, and moves q, k, v and the output.
    assert exchanged_bytes(LARGE, g, 8) == 4 * (tokens // 8) * 5120 * 2 * 40 * 7 / 8


def test_roofline_follows_the_window() -> None:
    costs = roofline(SMALL, 100, LINKS["pcie"])
    plan = windowed(4)
    for block, frames in ((0, 3), (1, 6), (6, 21), (50, 21)):
        want = task_flop(SMALL, 4680, 1560 * frames) / 100e12
        assert costs.item(plan, (denoise(0, block),)) == pytest.approx(want)
        assert costs.item(plan, (cache(0, block),)) == pytest.approx(want)
    assert costs.latents.busy == pytest.approx(599_040 / 31.5e9)
    assert "not measured" in costs.source


def test_head_parallelism() -> None:
    costs, link = roofline(SMALL, 100, LINKS["pcie"]), Link("test", 1e9, 1e-3)
    plan, alone = windowed(4), costs.curve("denoise", 0)(21)
    shared = head_parallel(costs, SMALL, Geometry(), 4, link).item(plan, (denoise(0, 20),))
    assert shared == pytest.approx(alone / 4 + 2 * 30 * 1e-3 + exchanged_bytes(SMALL, Geometry(), 4) / 1e9)
    assert head_parallel(costs, SMALL, Geometry(), 1, link).item(plan, (denoise(0, 20),)) == pytest.approx(alone)
    with pytest.raises(ValueError, match="ranks=8 is impossible: 12 heads cannot be divided evenly"):
        head_parallel(costs, SMALL, Geometry(), 8, link)
    assert head_parallel(costs, LARGE, Geometry(), 8, link).source == costs.source


STAGE_TIMES = {
    "model": "wan2.1-t2v-1.3b",
    "device": "a test",
    "revision": "0",
    "height": 60,
    "width": 104,
    "frames_per_block": 3,
    "denoise_s": [[3, 0.5], [21, 2.0]],
    "cache_s": [[[3, 0.25]], [[3, 0.5]]],
    "pair": 0.5,
    "decode_s": 0.125,
}


def test_measured_stage_times(tmp_path: Path) -> None:
    file = tmp_path / "stages.json"
    file.write_text(json.dumps(STAGE_TIMES))
    config, geometry, costs = measured(file, LINKS["10gbe"])
    assert (config, geometry) == (SMALL, Geometry())
    plan = windowed(2, fuse_cache_denoise=True)
    assert costs.item(plan, (denoise(1, 9),)) == 2.0
    assert costs.item(plan, (cache(1, 1), denoise(1, 2))) == 0.5 * (0.5 + 1.0)
    assert costs.decode == 0.125 and costs.source == "stage times measured on a test, revision 0"
    assert costs.keys.busy == pytest.approx(862_617_600 / 1.25e9)
    with pytest.raises(ValueError, match=r"cache must have one cost curve, or one per step \(4\), got 2"):
        simulate(windowed(4), 9, 1, costs)
    with pytest.raises(ValueError, match="stage times: denoise_s missing; legal: batch, cache_s"):
        measured({k: v for k, v in STAGE_TIMES.items() if k != "denoise_s"}, LINKS["pcie"])
    with pytest.raises(ValueError, match="stage times: speed unknown"):
        measured({**STAGE_TIMES, "speed": 1}, LINKS["pcie"])


# Bad input.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: makespan(p, 3, 3), "ranks must be 1 to 2, the number of steps, got 3"),
        (lambda p: makespan(p, 3, 0), "ranks must be a whole number of at least 1, got 0"),
        (lambda p: makespan(Plan(2, "block_first", 3), 3, 2), "ranks must be 1 with order='block_first'"),
        (lambda p: makespan(p, 3, 2, send_keys=-1), "send_keys must be a time of at least 0, got -1"),
        (lambda p: makespan(p, None, 1), "num_blocks must be a whole number of at least 2"),
        (lambda p: simulate(p, 1), "num_blocks must be a whole number of at least 2"),
        (lambda p: simulate(p, 3, (2, 1)), "split must be numbers >= 1 that sum to 2, got (2, 1)"),
        (lambda p: simulate(p, 3, (2, 0)), "split must be numbers >= 1 that sum to 2, got (2, 0)"),
        (lambda p: simulate(p, 3, vae="first"), "vae must be one of none, last, own, got 'first'"),
        (lambda p: simulate(p, 3, 2, batch=True), "ranks must be 1 with batch=True, got 2"),
        (lambda p: simulate(p, 3, in_flight=0), "in_flight must be a whole number of at least 1, got 0"),
        (lambda p: simulate(windowed(8, "wavefront"), 9, 2, in_flight=2), "in_flight=2 is impossible with order="),
        (
            lambda p: Costs(CostCurve(((0, 1),)), CostCurve(((0, 1),)), fused=-1),
            "fused must be a time of at least 0, got -1",
        ),
        (
            lambda p: Costs(CostCurve(((0, 1),)), CostCurve(((0, 1),)), batch=()),
            "batch must be the relative time per item",
        ),
        (lambda p: Link("x", 0, 0), "link x: bytes_per_second must be above 0, got 0"),
        (lambda p: roofline(SMALL, 0, LINKS["pcie"]), "tflops must be above 0, got 0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with refused(re.escape(message)):
        call(Plan(2, "stream", 3, prefix_frames=4))
