"""Captured CUDA graphs: the bits of the eager run, no host synchronisation and no allocation in a task.

The stand-in's tests (tests/rollout/test_cuda_graph.py) hold the logic on a CPU; here are the claims that only a
device can show.
"""

from __future__ import annotations

import pytest
import torch
from made_runs import make_rollout

import hiar_kernels
from hiar_model.benchmark.parts import SYNCS, calls_within
from hiar_model.config import FlowSchedule, WanConfig
from hiar_model.models.transformer import HiARTransformer
from hiar_model.rollout import Rollout

pytestmark = pytest.mark.gpu

CONFIG = WanConfig(
    dim=128, ffn_dim=256, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=6, in_channels=4, out_channels=4
)
WALKS = [
    {"order": "step_first"},
    {"order": "stream"},
    {"order": "stream", "pairs": True},
    {"order": "wavefront"},
    {"order": "wavefront", "pairs": True},
    {"order": "block_first"},
    {"order": "stream", "cache_source": "next_step"},
    {"order": "stream", "cache_source": "next_step", "kv_dtype": "float8_e4m3fn"},
    {"order": "wavefront", "pairs": True, "kv_dtype": "float8_e4m3fn", "attention_dtype": "float8_e4m3fn"},
]


@pytest.fixture(scope="module")
def model():
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu needs a CUDA device, torch finds none", pytrace=False)
    torch.manual_seed(0)
    return HiARTransformer(CONFIG).to("cuda", torch.bfloat16).eval().requires_grad_(False)


def made(model: HiARTransformer, executor: str, **options) -> Rollout:
    text = torch.randn(1, 4, CONFIG.text_dim, generator=torch.Generator().manual_seed(1)).to(model.head.head.weight)
    options = {"num_frames": 24, "window_frames": 9, "sink_frames": 1, **options}
    return make_rollout(model, text, FlowSchedule(), height=16, width=24, executor=executor, **options)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])  # by frame ids on the device; by layouts, through a library
@pytest.mark.parametrize("walk", WALKS, ids=str)
def test_graph_and_eager_are_the_same_bits(model, walk, impl):
    with hiar_kernels.prefer(impl):
        eager, graph = (made(model, executor, **walk) for executor in ("eager", "graph"))
        for one, other in zip(eager, graph, strict=True):
            assert torch.equal(one.latents, other.latents), one.block
    if impl == "triton":
        assert graph._executor.counters.captures < graph._executor.counters.launches


@pytest.mark.parametrize("walk", WALKS[1:], ids=str)
def test_a_visit_waits_for_nothing_and_allocates_nothing(model, walk):
    with hiar_kernels.prefer("triton"):
        rollout = made(model, "graph", num_frames=None, **walk)
        rollout.warm_up()
        for n, group in zip(range(60), rollout.plan.groups(None)):
            finishes = any(v.kind == "denoise" and v.step + 1 == rollout.plan.steps for row in group for v in row)
            begins = any(v.kind == "denoise" and v.step == 0 for row in group for v in row)
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            torch.cuda.set_sync_debug_mode("error")
            try:
                rollout._executor.run(group)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            rollout._executor.await_finished(None)  # whether a finished block is finite
            # a finished block is given away in memory of its own
            if n > 20 and not finishes and not begins:
                assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, group
        assert rollout._executor.counters.captures == len(rollout._executor.batched_forwards)


@pytest.mark.parametrize("walk", WALKS[1:], ids=str)
def test_a_block_is_waited_for_once(model, walk):
    with hiar_kernels.prefer("triton"):
        rollout = made(model, "graph", num_frames=None, **walk)
        rollout.warm_up()
        blocks = iter(rollout)
        for _ in range(4):
            next(blocks)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            with torch.profiler.record_function("three blocks"):
                for _ in range(3):
                    next(blocks)
        called = calls_within(profiler.events(), "three blocks")
        assert [name for name in called if name in SYNCS] == ["cudaEventSynchronize"] * 3


def test_a_visit_is_one_graph_launch(model):
    with hiar_kernels.prefer("triton"):
        rollout = made(model, "graph", num_frames=None, order="stream")
        rollout.warm_up()
        blocks = iter(rollout)
        for _ in range(4):
            next(blocks)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profiler:
            next(blocks)
        graphs = sum(event.name == "cudaGraphLaunch" for event in profiler.events())
        assert graphs == 4 + 1  # the denoise tasks, and the four cache tasks of the block before as one batch
