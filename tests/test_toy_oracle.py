"""The oracle of the toy world: right on ground truth, not fooled by broken videos."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch

from hiar_model.toy import prompt as grammar
from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.oracle import NOTHING, Reading, Summary, ToyOracle
from hiar_model.toy.prompt import ToyPrompt
from hiar_model.toy.world import Scene, ToyWorld, WorldConfig

pytestmark = pytest.mark.cpu

PROMPT = ToyPrompt("red", "circle", "right")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return ToyWorld()


@pytest.fixture(scope="module")
def codec() -> ToyCodec:
    return ToyCodec.fit()


@pytest.fixture(scope="module")
def oracle() -> ToyOracle:
    return ToyOracle()


def read(oracle: ToyOracle, videos: torch.Tensor, prompts: list[ToyPrompt]) -> list[Reading]:
    return [oracle.evaluate(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]


@pytest.mark.parametrize("treatment", ["truth", "codec", "uint8", "noise"])
def test_oracle_is_right_on_truth(world: ToyWorld, codec: ToyCodec, oracle: ToyOracle, treatment: str) -> None:
    sample = world.sample_batch(128, 12, generator(3), start="anywhere")
    videos = sample.videos if treatment == "truth" else codec.decode(codec.encode(sample.videos))
    if treatment == "uint8":
        videos = ToyCodec.to_uint8(videos)
    if treatment == "noise":
        videos = videos + 0.03 * torch.randn(videos.shape, generator=generator(4))
    readings = read(oracle, videos, sample.prompts)
    summary = Summary.of(readings)
    assert min(summary.colour, summary.shape, summary.valid, summary.direction) >= 0.995
    assert summary.overlap > 0.93 and summary.speed_ratio == pytest.approx(1, abs=0.01)
    assert sum(float(r.size_right.double().mean()) for r in readings) / len(readings) >= 0.995
    assert all(r.speed_ratio == pytest.approx(1, abs=0.03) and r.direction_error < 2 for r in readings)


def test_oracle_finds_the_centre(world: ToyWorld, oracle: ToyOracle) -> None:
    sample = world.sample_batch(64, 6, generator(5), start="anywhere")
    starts = torch.tensor([[scene.x, scene.y] for scene in sample.scenes], dtype=torch.float64)
    truth = world.centres(sample.tokens, starts, 6)
    found = torch.stack([reading.centres for reading in read(oracle, sample.videos, sample.prompts)])
    error = (found - truth + 16) % 32 - 16
    assert error.abs().max() < 0.25
    assert ((found >= 0) & (found < 32)).all()


def clip(world: ToyWorld, prompt: ToyPrompt, frames: int = 24) -> torch.Tensor:
    return world.render(Scene(prompt, 15.0, 17.0), 0, frames)


def test_oracle_rejects_what_is_not_prompted(world: ToyWorld, oracle: ToyOracle) -> None:
    """One attribute wrong: that one is reported, the others are not."""
    video = clip(world, PROMPT)
    for wrong in ({"colour": "orange"}, {"shape": "square"}, {"size": "large"}, {"size": "small"}):
        reading = oracle.evaluate(video, dataclasses.replace(PROMPT, **wrong))
        assert not reading.valid.any() and reading.direction_right
        assert bool(reading.colour_right.all()) == ("colour" not in wrong)
        assert bool(reading.shape_right.all()) == ("shape" not in wrong)
        assert bool(reading.size_right.all()) == ("size" not in wrong)
    for direction in grammar.DIRECTIONS[1:]:
        reading = oracle.evaluate(video, dataclasses.replace(PROMPT, direction=direction))
        assert reading.valid.all() and not reading.direction_right
        assert reading.direction_error > 44
    fast = oracle.evaluate(video, dataclasses.replace(PROMPT, speed="fast"))
    assert fast.direction_right and fast.speed_ratio == pytest.approx(1.1 / 1.8, abs=0.01)


def test_oracle_sees_static_and_reversed(world: ToyWorld, oracle: ToyOracle) -> None:
    video = clip(world, PROMPT)
    static = oracle.evaluate(video[:1].expand(24, -1, -1, -1), PROMPT)
    assert static.valid.all() and static.speed_ratio < 0.01 and not static.direction_right
    backwards = oracle.evaluate(video.flip(0), PROMPT)
    assert backwards.direction_error == pytest.approx(180, abs=1) and not backwards.direction_right
    noisy = video[:1] + 0.05 * torch.randn(video.shape, generator=generator())
    assert not oracle.evaluate(noisy, PROMPT).direction_right


def test_oracle_sees_ghosts(world: ToyWorld, oracle: ToyOracle) -> None:
    video = clip(world, PROMPT)
    background = (2 * world.background - 1)[:, None, None].expand_as(video)
    for apart in (8, 12, 16):
        other = video.roll(apart, 3)
        blend = oracle.evaluate((video + other) / 2, PROMPT)
        assert not blend.colour_right.any() and not blend.valid.any()
        both = oracle.evaluate(background + (video - background) + (other - background), PROMPT)
        assert not both.valid.any() and both.overlap.max() < 0.7


def test_oracle_sees_faded_blank_and_noise(world: ToyWorld, oracle: ToyOracle) -> None:
    video = clip(world, PROMPT)
    background = (2 * world.background - 1)[:, None, None].expand_as(video)
    assert not oracle.evaluate((video + background) / 2, PROMPT).colour_right.any()
    for empty in (background, torch.full_like(video, -1.0), torch.full_like(video, math.nan)):
        reading = oracle.evaluate(empty, PROMPT)
        assert (reading.shape == NOTHING).all() and (reading.colour == NOTHING).all()
        assert (reading.overlap == 0).all() and reading.centres.isnan().all()
        assert math.isnan(reading.speed_ratio) and not reading.direction_right
    for full in (torch.ones_like(video), torch.rand(video.shape, generator=generator()) * 2 - 1):
        assert not oracle.evaluate(full, PROMPT).valid.any()


def test_parts_report_where_it_went_wrong(world: ToyWorld, oracle: ToyOracle) -> None:
    video = clip(world, PROMPT, 72)
    video[36:] = video[35]
    video[60:] = clip(world, dataclasses.replace(PROMPT, colour="green"))[:1]
    parts = oracle.evaluate(video, PROMPT).parts(6)
    assert [len(part) for part in parts] == [12] * 6
    assert [bool(part.valid.all()) for part in parts] == [True] * 5 + [False]
    assert [part.direction_right for part in parts] == [True] * 3 + [False] * 3
    assert [round(part.speed_ratio, 1) for part in parts] == [1, 1, 1, 0, 0, 0]
    assert Summary.of(parts).valid == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="cannot cut"):
        parts[0].parts(13)
    with pytest.raises(ValueError, match="nothing"):
        Summary.of([])


def test_motion_survives_missing_frames_and_counts_jumps(world: ToyWorld, oracle: ToyOracle) -> None:
    video = clip(world, PROMPT)
    video[5:8] = -1
    assert oracle.evaluate(video, PROMPT).speed_ratio == pytest.approx(1, abs=0.02)
    # Steps of 0, 0 and 3 frames, as blocks that hardly move inside: a median of steps would say "static".
    jumpy = clip(world, PROMPT)[torch.arange(24) // 3 * 3]
    assert oracle.evaluate(jumpy, PROMPT).speed_ratio == pytest.approx(1, abs=0.05)


def test_oracle_takes_enlarged_videos_and_other_worlds(world: ToyWorld, oracle: ToyOracle) -> None:
    frames = ToyCodec.to_uint8(clip(world, PROMPT)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert oracle.evaluate(frames, PROMPT.text()).valid.all()
    for wrong in (frames[:, :250], frames[:0], frames[..., :1], frames.double(), frames[:, ::16, ::16]):
        with pytest.raises(ValueError, match="frames"):
            oracle.evaluate(wrong, PROMPT)
    config = WorldConfig(height=48, width=64)
    sample = ToyWorld(config).sample_batch(8, 6, generator(), start="anywhere")
    summary = Summary.of(read(ToyOracle(config), sample.videos, sample.prompts))
    assert summary.valid == 1 and summary.direction == 1


def test_oracle_is_fast(world: ToyWorld, oracle: ToyOracle) -> None:
    video = clip(world, PROMPT, 72)
    oracle.evaluate(video[:2], PROMPT)
    start = time.perf_counter()
    oracle.evaluate(video, PROMPT)
    assert time.perf_counter() - start < 0.5
