"""Infilling: what is given stays and is seen at every level as an ordinary rollout would have it; the rest is made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ids import brief
from tiny_model import MODEL, SIZE, TEXT, TINY, difference, make_model

from hiar_model.config import FlowSchedule
from hiar_model.rollout.infill import infill
from hiar_model.rollout.noise import INITIAL, keyed_noise

pytestmark = pytest.mark.cpu

SCHEDULE = FlowSchedule.uniform(3)
FRAMES, BLOCK = 12, 3
SHAPE = (TINY.in_channels, *SIZE.values())
CLEAN = torch.randn(2, FRAMES, *SHAPE, generator=torch.Generator().manual_seed(3))
ENDS = torch.tensor([True] * 3 + [False] * 6 + [True] * 3).expand(2, -1)


def noise(step: int, seed: int = 5) -> torch.Tensor:
    """Of the clip, as a rollout has it."""
    drawn = [[keyed_noise(seed, video, step, n, (BLOCK, *SHAPE)) for n in range(FRAMES // BLOCK)] for video in (0, 1)]
    return torch.stack([torch.cat(blocks) for blocks in drawn])


def plain(sampler: str, model) -> torch.Tensor:
    """Few-step sampling of a whole clip in float64, written out."""
    x = noise(INITIAL).double()
    for step, (sigma, following) in enumerate(zip(SCHEDULE.sigmas, SCHEDULE.sigmas[1:], strict=False)):
        t = torch.full((2, FRAMES), 1000 * sigma, dtype=torch.float64)
        velocity = model(x, t, TEXT.expand(2, -1, -1))
        x0 = x - sigma * velocity
        ode = x + (following - sigma) * velocity
        x = (1 - following) * x0 + following * noise(step).double() if sampler == "sde" else ode
    return x


def run(known=ENDS, **options) -> torch.Tensor:
    options = {"seed": 5, **options}
    return infill(options.pop("model", MODEL), options.pop("latents", CLEAN), known, TEXT, SCHEDULE, **options)


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_given_frames_stay_and_are_noised_to_every_level(sampler):
    seen = []
    made = run(sampler=sampler, on_level=lambda step, x: seen.append(x.clone()))
    assert torch.equal(made[ENDS], CLEAN[ENDS])
    assert difference(made[~ENDS], CLEAN[~ENDS]) > 0.1
    for step, x in enumerate(seen):
        sigma = SCHEDULE.sigmas[step]
        # a level's noise is that of the step before it, and of the beginning where steps follow the velocity
        eps = noise(step - 1 if sampler == "sde" else INITIAL)
        expected = (1 - sigma) * CLEAN + sigma * eps
        assert torch.equal(x[ENDS], expected[ENDS]), step
    assert torch.equal(seen[0][~ENDS], noise(INITIAL)[~ENDS])


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_with_nothing_given_it_is_plain_sampling(sampler):
    exact = make_model().double()
    made = run((), model=exact, sampler=sampler)
    assert made.dtype == torch.float64 and difference(made, plain(sampler, exact)) < 1e-10
    assert torch.equal(made, run(torch.zeros(2, FRAMES, dtype=torch.bool), model=exact, sampler=sampler))


def test_with_all_given_it_is_what_was_given():
    assert torch.equal(run(range(4)), CLEAN)


def test_the_middle_sees_both_ends_and_no_other_video():
    made = run()
    for end in (slice(0, 3), slice(9, 12)):
        other = CLEAN.clone()
        other[0, end] += 1
        found = run(latents=other)
        assert difference(found[0, 3:9], made[0, 3:9]) > 1e-3
        assert torch.equal(found[1], made[1])


def test_what_stands_where_nothing_is_given_is_not_looked_at():
    poisoned = torch.where(ENDS[:, :, None, None, None], CLEAN, torch.nan)
    assert torch.equal(run(latents=poisoned), run())


def test_blocks_by_number_frames_of_each_video_and_a_model_for_each_step():
    assert torch.equal(run([0, 3]), run())
    mask = torch.zeros(2, FRAMES, dtype=torch.bool)
    mask[0, 4], mask[1, :2] = True, True  # no whole blocks, another part of each video
    made = run(mask)
    assert torch.equal(made[mask], CLEAN[mask])
    experts = [make_model(s) for s in range(3)]
    assert difference(run(model=experts), run()) > 1e-2
    assert difference(run(model=[MODEL] * 3), run()) == 0


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_clean_context_is_seen_at_level_0(sampler):
    """Written out in float64; and again without it, for the noise of blocks that begin at another and a short one."""
    model, known, numbers = make_model().double(), torch.zeros(2, 7, dtype=torch.bool), (4, 5, 6)
    known[:, [0, 6]] = True

    def drawn(step: int) -> torch.Tensor:
        lengths = zip(numbers, (1, 3, 3), strict=True)
        blocks = [[keyed_noise(5, video, step, n, (length, *SHAPE)) for video in (0, 1)] for n, length in lengths]
        return torch.cat([torch.stack(videos) for videos in blocks], 1).double()

    clean, x = CLEAN[:, :7].double(), drawn(INITIAL)
    for step, (sigma, following) in enumerate(zip(SCHEDULE.sigmas, SCHEDULE.sigmas[1:], strict=False)):
        x[known] = clean[known]
        t = torch.full((2, 7), 1000 * sigma, dtype=torch.float64).masked_fill(known, 0.0)
        velocity = model(x, t, TEXT.expand(2, -1, -1))
        x0 = x - sigma * velocity
        ode = x + (following - sigma) * velocity
        x = (1 - following) * x0 + following * drawn(step) if sampler == "sde" else ode
    x[known] = clean[known]
    options = {"latents": CLEAN[:, :7], "model": model, "sampler": sampler, "first_block": 4, "first_block_frames": 1}
    assert difference(run(known, clean_context=True, **options), x) < 1e-10
    assert difference(run(known, **options), x) > 1e-3


def test_noise_belongs_to_the_video():
    alone = infill(MODEL, CLEAN[1:], [0, 3], TEXT, SCHEDULE, seed=5, video_ids=[1])
    assert difference(alone, run()[1:]) < 1e-5
    assert difference(run(seed=6)[:, 3:9], run()[:, 3:9]) > 0.1


def test_positions_are_those_of_the_video():
    """RoPE is relative: the whole clip may stand anywhere."""
    assert difference(run(first_frame=999_999), run()) < 1e-5


def test_levels_are_rounded_once_in_16_bits():
    """Where the velocity is 0, each step is a sum of two: written out in float32."""
    model = make_model().bfloat16()
    model.head.head.weight.data.zero_(), model.head.head.bias.data.zero_()
    levels = []
    run(model=model, on_level=lambda step, x: levels.append(x.clone()))
    known, x = ENDS[:, :, None, None, None], noise(INITIAL).bfloat16()
    for step, level in enumerate(levels):
        sigma, eps = SCHEDULE.sigmas[step], noise(step - 1).bfloat16()
        base = torch.where(known, CLEAN.bfloat16(), x if step else eps)
        x = ((1 - sigma) * base.float() + sigma * eps.float()).bfloat16()
        assert torch.equal(level, x), step


def test_not_finite_is_told():
    """Also of one channel."""
    broken = make_model()
    broken.head.head.bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite from step 0 on"):
        run(model=broken)


def test_known_of_every_kind():
    """Numbers of blocks and masks, of numpy and torch."""
    expected = run()
    for known in ([0, 3], np.array([0, 3]), torch.tensor([0, 3]), (np.int64(0), 3), ENDS.numpy()):
        assert torch.equal(run(known), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": CLEAN[:, :10]}, "whole blocks of frames_per_block=3, got 10 frames"),
        (
            {"latents": CLEAN[:, :9], "first_block_frames": 1},
            "whole blocks of frames_per_block=3 behind the first 1, got 9 frames",
        ),
        ({"first_block_frames": 4}, "first_block_frames must be a whole number from 1 to 3, got 4"),
        ({"latents": CLEAN[0]}, r"latents must be \[B, F, 2, H, W\], got \[12, 2, 2, 4\]"),
        ({"known": [4]}, r"known blocks must be in 0..3, got 4"),
        ({"known": torch.ones(2, 9, dtype=torch.bool)}, r"known must be bool \[2, 12\], got torch.bool \[2, 9\]"),
        ({"known": torch.ones(2, 12)}, r"known must be bool \[2, 12\], got torch.float32"),
        ({"latents": CLEAN.numpy()}, "latents must be a tensor, got ndarray"),
        ({"latents": CLEAN.int()}, "latents must be of a floating dtype, got torch.int32"),
        ({"known": torch.tensor([0, 4])}, "known blocks must be in 0..3, got 4"),
        ({"sampler": "x"}, "sampler must be one of sde, ode, got 'x'"),
        ({"model": [MODEL]}, "one for each of the 3 steps, got 1"),
        ({"video_ids": [1]}, "one for each of 2 videos, got 1"),
    ],
    ids=brief,
)
def test_bad_requests_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
