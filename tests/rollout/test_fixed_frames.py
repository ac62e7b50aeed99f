"""Conditioning frames inside generated blocks: every order gives what the page says, and they stay as they are."""

from __future__ import annotations

import itertools

import pytest
import torch
from refusals import refused
from tiny_model import MODEL, SIZE, TEXT, TINY, difference, reference

from hiar_model import ExecutionConfig, FlowSchedule, Rollout, RolloutConfig

pytestmark = pytest.mark.cpu

SHAPE = (1, TINY.in_channels, *SIZE.values())
SCHEDULE = FlowSchedule.uniform(4)
FRAMES = {frame: torch.randn(SHAPE, generator=torch.Generator().manual_seed(frame)) for frame in (4, 7, 8, 12)}
PREFIX = torch.randn(1, 1, *SHAPE[1:], generator=torch.Generator().manual_seed(9))


def rollout(order: str = "step_first", frames=FRAMES, execution=None, **options) -> Rollout:
    prefix = options.pop("prefix", None)
    config = RolloutConfig(SCHEDULE.steps, SCHEDULE.shift, order, window_frames=9, **options)
    return Rollout(
        MODEL, TEXT, config, execution, num_latent_frames=12 if prefix is None else 13, latent_size=(2, 4),
        prefix=prefix, conditioning_frames={f: x for f, x in frames.items() if prefix is not None or f < 12},
    )  # fmt: skip


def made(*args, **options) -> torch.Tensor:
    return torch.cat([block.latents for block in rollout(*args, **options)], 1)


@pytest.mark.parametrize("sampler", ["sde", "ode"])
@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_every_order_gives_what_the_page_says(sampler, prefix):
    count, ahead = (12, 0) if prefix is None else (13, 1)
    frames = {frame: x for frame, x in FRAMES.items() if frame < count}
    about = {"window_frames": 9, "trajectory": sampler, "prefix": prefix}
    expected = reference(count, conditioning_frames=frames, **about)
    assert difference(expected, reference(count, **about)) > 0.1
    for order, fused in itertools.product(("step_first", "stream", "wavefront"), (False, True)):
        found = made(order, sampler=sampler, prefix=prefix, fuse_cache_denoise=fused)
        assert difference(found, expected) < 1e-5, (order, fused)
        assert all(torch.equal(found[:, frame - ahead], x) for frame, x in frames.items())


@pytest.mark.parametrize("context", ["block_first", "next_step"])
def test_in_other_contexts(context):
    clean = context == "block_first"
    about = {"order": "block_first"} if clean else {"cache_source": "next_step"}
    expected = reference(12, window_frames=9, conditioning_frames={f: x for f, x in FRAMES.items() if f < 12}, **about)
    options = {"order": "block_first"} if clean else {"order": "stream", "kv_source": "next_step"}
    assert difference(made(**options), expected) < 1e-5


def test_a_saved_state_goes_on_and_belongs_to_its_frames():
    whole, first, second = made("stream"), rollout("stream"), rollout("stream")
    blocks = iter(first)
    before = next(blocks).latents
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat([before, *(block.latents for block in second)], 1), whole)
    with pytest.raises(ValueError, match="state of a different rollout: .*conditioning frames 4, 7, 8"):
        rollout("stream", {}).load_state_dict(first.state_dict())


def test_a_pipeline_of_one_process():
    execution = ExecutionConfig(steps_per_rank=(4,))
    assert torch.equal(made("stream", execution=execution), made("stream"))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ({0: FRAMES[4]}, "conditioning_frames must be in 1 to 12, got 0"),
        ({13: FRAMES[4]}, "conditioning_frames must be in 1 to 12, got 13"),
        ({3: FRAMES[4][0]}, r"conditioning_frames\[3\] must be \[1, 2, 2, 4\], got \[2, 2, 4\]"),
    ],
)
def test_bad_frames_are_refused_in_one_line(frames, message):
    with refused(message):
        rollout(frames=frames, prefix=PREFIX)
