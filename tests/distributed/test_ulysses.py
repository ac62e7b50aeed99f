"""Ulysses: several processes share every task and make the video of one process, equal to the bit on every rank.

Four processes make all videos of this file in one job, as four ranks of the axis "head" or as two replicas of two.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from made_runs import make_rollout
from refusals import refused
from tiny_model import TEXT, TINY, difference, make_model

from hiar_model.config import FlowSchedule, WanConfig
from hiar_model.distributed import axis, make_mesh, ulysses
from hiar_model.rollout import Rollout

pytestmark = pytest.mark.cpu

RANKS = 4
TOLERANCE = 1e-5  # float32: matrix products of fewer tokens may sum in another order
CONFIG = WanConfig(
    dim=32, ffn_dim=32, num_heads=4, num_layers=2, freq_dim=8, text_dim=6, text_len=5, in_channels=2, out_channels=2
)
SIZE = {"height": 6, "width": 8}  # 3 x 4 tokens: a rank's 3 or 6 tokens end inside a line of the grid
PREFIX = torch.randn(1, 4, 2, *SIZE.values(), generator=torch.Generator().manual_seed(2))
MODEL, OTHER = (make_model(seed, replace(CONFIG, num_layers=1)) for seed in range(2))
DEEP = make_model(0, CONFIG)
VIDEOS: dict[str, dict[str, Any]] = {
    "step_first": {},
    "stream": {"order": "stream", "window_frames": 5},
    "wavefront": {"order": "wavefront", "window_frames": 7, "sink_frames": 2, "model": DEEP},
    "pairs": {"order": "wavefront", "pairs": True, "window_frames": (3, 4, 7, None)},
    "block_first": {"order": "block_first", "window_frames": 6},
    "shared KV": {"order": "wavefront", "cache_source": "next_step", "window_frames": (4, 7, 5, 6)},
    "prefix": {"prefix": PREFIX, "num_frames": 10, "order": "stream"},
    "two videos": {"batch": 2, "order": "stream", "pairs": True, "window_frames": 5, "sink_frames": 1},
    "far on": {"first_frame": 1_000_000, "num_frames": 6, "trajectory": "ode"},
    "a model for each step": {"model": [MODEL, OTHER, MODEL, OTHER], "num_frames": 6},
    "recorded": {"order": "wavefront", "window_frames": 5, "executor": "recorded"},
}


def start(**options: Any) -> Rollout:
    options = {"num_frames": 9, **SIZE, **options}
    return make_rollout(options.pop("model", MODEL), options.pop("text", TEXT), FlowSchedule.uniform(4), **options)


def run(**options: Any) -> torch.Tensor:
    return torch.cat([block.latents for block in start(**options)], 1)


def refusal(**options: Any) -> str:
    try:
        run(**options)
    except (ValueError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def on_a_rank(rank: int, folder: str) -> None:
    """Run by every process; its results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=120), world_size=RANKS, rank=rank)
    four = make_mesh(head=4)
    results: dict[str, Any] = {name: run(parallel="ulysses", mesh=four, **options) for name, options in VIDEOS.items()}
    wide = copy.deepcopy(DEEP).double()
    results["float64"] = run(model=wide, text=TEXT.double(), parallel="ulysses", **VIDEOS["two videos"])
    results["bfloat16"] = run(model=copy.deepcopy(DEEP).bfloat16(), parallel="ulysses")

    both = make_mesh(step=2, head=2)
    results["pipeline"] = [
        b.latents for b in start(executor="pipeline", parallel="ulysses", mesh=both, **VIDEOS["stream"])
    ]
    two = make_mesh(head=2, replica=2)
    replica = two.get_local_rank("replica")
    results["replica"] = (replica, run(parallel="ulysses", mesh=two, seed=replica, **VIDEOS["pairs"]))

    rollout = start(parallel="ulysses", mesh=four, order="stream", window_frames=5)
    ring = rollout._executor.cache
    results["ring"] = sum(t.numel() * t.element_size() for t in [*ring.k, *ring.v, ring.frames])
    first = next(iter(rollout))
    state = rollout.state_dict()
    again = start(parallel="ulysses", mesh=four, order="stream", window_frames=5)
    again.load_state_dict(state)
    results["resumed"] = torch.cat([block.latents for block in [first, *again]], 1)

    keys: list[Any] = [None] * RANKS
    dist.all_gather_object(keys, state["key"])
    try:
        again.load_state_dict({**state, "key": keys[rank - 1]})
    except ValueError as error:
        results["state of another rank"] = str(error)
    nan = lambda step, block: torch.full((1, 3, 2, *SIZE.values()), float("nan") if (step, block) == (1, 2) else 0.0)  # noqa: E731
    refused = {
        "heads": {"model": make_model(0, TINY)},
        "tokens": {"height": 4, "width": 6},
        "another seed": {"seed": int(rank == 2), "num_frames": 3},
        "not finite": {"renoise": nan},
    }
    results |= {name: refusal(parallel="ulysses", **options) for name, options in refused.items()}
    for name, wrong in (("mesh", lambda: make_mesh(head=3)), ("axis", lambda: axis(four["step"], "head"))):
        with pytest.raises(ValueError) as error:
            wrong()
        results[name] = str(error.value)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # after gloo a normal exit of the interpreter may abort


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes.on_ranks(RANKS, on_a_rank, str(folder))
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]


def of_all_ranks(results: list[dict[str, Any]], name: str) -> torch.Tensor:
    videos = [of_rank[name] for of_rank in results]
    assert all(torch.equal(video, videos[0]) for video in videos), "ranks disagree"
    return videos[0]


@pytest.mark.parametrize("name", VIDEOS)
def test_four_ranks_make_the_video_of_one(name, results):
    video, expected = of_all_ranks(results, name), run(**{**VIDEOS[name], "executor": "eager"})
    assert video.shape == expected.shape and expected.abs().max() > 0.1
    assert difference(video, expected) < TOLERANCE


def test_saved_and_resumed_equals_one_run_bit_for_bit(results):
    assert torch.equal(of_all_ranks(results, "resumed"), results[0]["stream"])


def test_the_difference_is_rounding(results):
    """In float64 the difference shrinks with the rounding; in bfloat16 ranks still agree to the bit."""
    wide = copy.deepcopy(DEEP).double()
    expected = run(model=wide, text=TEXT.double(), **VIDEOS["two videos"])
    assert difference(of_all_ranks(results, "float64"), expected) < 1e-12
    narrow = of_all_ranks(results, "bfloat16")
    assert narrow.dtype == torch.bfloat16 and difference(narrow.float(), run(model=DEEP)) < 0.5


def test_replicas_make_other_videos(results):
    for replica, video in (of_rank["replica"] for of_rank in results):
        assert difference(video, run(seed=replica, **VIDEOS["pairs"])) < TOLERANCE
    assert sorted(of_rank["replica"][0] for of_rank in results) == [0, 0, 1, 1]
    (_, a), (_, b) = (next(r["replica"] for r in results if r["replica"][0] == n) for n in range(2))
    assert difference(a, b) > 0.1


def test_two_axes_at_once(results):
    """Two ranks of steps, two of heads: both ranks of the last steps have the finished blocks."""
    videos = [of_rank["pipeline"] for of_rank in results]
    assert videos[:2] == [[], []]
    for blocks in videos[2:]:
        assert torch.equal(torch.cat(blocks, 1), torch.cat(videos[3], 1))
    assert difference(torch.cat(videos[3], 1), run(**VIDEOS["stream"])) < TOLERANCE


def test_a_rank_holds_its_heads_of_the_rings(results):
    cache = start(order="stream", window_frames=5)._executor.cache
    tokens, of_ids = cache.frame_tokens, cache.frames.numel() * cache.frames.element_size()
    ring_bytes = cache.memory_bytes(MODEL.config, cache.capacities, 1, tokens)
    for of_rank in results:
        assert of_rank["ring"] == (ring_bytes - of_ids) // RANKS + of_ids
        assert of_rank["ring"] == cache.memory_bytes(MODEL.config, cache.capacities, 1, tokens, heads=1)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("heads", "divides 2 heads and 12 tokens per frame evenly: the head axis must have 1, 2 ranks, got 4"),
        ("tokens", "divides 4 heads and 6 tokens per frame evenly: the head axis must have 1, 2 ranks, got 4"),
        ("another seed", "needs the same rollout on every rank; rank {rank} of the head"),
        ("not finite", "FloatingPointError: latents are not finite from step 1 of block 2 on"),
        ("mesh", "step x head x replica must be the 4 processes of the job, got 1 x 3 x 1"),
        ("axis", "mesh must have an axis named 'head', got step"),
        ("state of another rank", "state of a different rollout: it has heads"),
    ],
)
def test_refusals_are_one_line_on_every_rank(what, message, results):
    for rank, of_rank in enumerate(results):
        assert message.format(rank=rank) in of_rank[what], of_rank[what]
        assert "\n" not in of_rank[what]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": "ring"}, "parallel must be one of ulysses, got 'ring'"),
        ({"parallel": "ulysses"}, r"torch.distributed is not initialized: run under torchrun"),
    ],
)
def test_refused_without_a_job(options, message):
    with refused(message):
        start(**options)


def test_the_legal_numbers_of_ranks_are_those_that_divide_both(monkeypatch):
    class GroupOfFive:
        group_name = "of five"

    monkeypatch.setattr(ulysses, "axis", lambda mesh, name: GroupOfFive())
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 5)
    config = replace(CONFIG, dim=72, num_heads=12)
    with refused("divides 12 heads and 18 tokens per frame evenly: the head axis must have 1, 2, 3, 6 ranks, got 5"):
        ulysses.HeadRanks(config, (3, 6), object())
