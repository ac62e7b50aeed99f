"""The toy world: grammar, text vectors, rendering, codec."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from calls import count_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_codec import fit_once

from hiar_model.toy import prompt as grammar
from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.prompt import ToyPrompt, parse
from hiar_model.toy.text import ToyTextEncoder
from hiar_model.toy.world import (
    FAINTEST,
    LIGHT_WAVES,
    WAVES,
    WORLDS,
    Distractor,
    Grating,
    Scene,
    ToyWorld,
    WorldConfig,
)

pytestmark = pytest.mark.cpu

PROMPTS = st.builds(ToyPrompt, **{slot: st.sampled_from(words) for slot, words in grammar.SLOTS.items()})
PROMPT = ToyPrompt("red", "circle", "right")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Grammar and tokens


@settings(deadline=None)
@given(PROMPTS, st.sampled_from(["", "a ", "An ", "THE  "]), st.booleans(), st.sampled_from(["", ".", " "]))
def test_text_round_trip(prompt: ToyPrompt, article: str, upper: bool, end: str) -> None:
    text = prompt.text()
    assert parse(text) == prompt
    text = article + text.split(" ", 1)[1] + end
    assert parse(text.upper() if upper else text) == prompt
    assert ToyPrompt.from_tokens(grammar.encode(text)) == prompt


def test_examples_and_canonical_forms() -> None:
    assert parse("a blue square moving up fast") == ToyPrompt("blue", "square", "up", speed="fast")
    assert parse("orange plus moving left").text() == "an orange plus moving left"
    for spelling in ("up and right", "right and up", "up-right", "right-up", "up right"):
        assert parse(f"a small red circle moving {spelling} slowly").direction == "up and right"
    prompts = grammar.all_prompts()
    assert len({prompt.text() for prompt in prompts}) == len(prompts) == 3 * 8 * 4 * 8 * 3


@pytest.mark.parametrize(
    ("text", "wrong", "legal"),
    [
        ("", "empty", "red"),
        (" . ", "empty", "circle"),
        ("a", "colour is missing", "purple"),
        ("a tiny red circle moving up", "'tiny' is no legal colour", "small, large"),
        ("a pink circle moving up", "'pink' is no legal colour", "cyan"),
        ("a red hexagon moving up", "'hexagon' is no legal shape", "triangle"),
        ("a red circle", "verb is missing", "moving"),
        ("a red circle going up", "'going' is no legal verb", "moving"),
        ("a red circle moving", "direction is missing", "down and left"),
        ("a red circle moving sideways", "'sideways' is no legal direction", "up and right"),
        ("a red circle moving up-down", "'up-down' is no legal direction", "up and right"),
        ("a red circle moving up and down", "'down' is no legal direction after \"up and\"", "left, right"),
        ("a red circle moving left and", 'direction after "left and" is missing', "up, down"),
        ("a red circle moving up quickly", "'quickly' is no legal speed", "slowly, fast"),
        ("a red circle moving up fast today", "'today' is no legal word after the speed", "none"),
        ("a red circle\nmoving up " + "very " * 99, "'very' is no legal speed", "slowly"),
    ],
)
def test_error_lines(text: str, wrong: str, legal: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(text)
    line = str(error.value)
    assert wrong in line and legal in line
    assert "\n" not in line and len(line) < 450


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_parses_or_names_its_fault(text: str) -> None:
    try:
        assert parse(parse(text).text()) == parse(text)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1


def test_prompt_fields_and_tokens_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        ToyPrompt("red", "blob", "up")
    tokens = PROMPT.tokens()
    assert len(tokens) == grammar.PROMPT_TOKENS and grammar.NULL_TOKEN not in tokens
    for bad in (tokens[::-1], tokens[:4], [grammar.NULL_TOKEN] * 5, [*tokens[:4], grammar.VOCABULARY_SIZE]):
        with pytest.raises(ValueError):
            ToyPrompt.from_tokens(bad)
    with pytest.raises(TypeError):
        parse(None)  # type: ignore[arg-type]


def test_split_prompts_is_fixed_and_disjoint() -> None:
    train, held_out = grammar.split_prompts(64, seed=3)
    assert (train, held_out) == grammar.split_prompts(64, seed=3)
    assert len(held_out) == 64 and set(train) | set(held_out) == set(grammar.all_prompts())
    assert not set(train) & set(held_out)
    assert torch.equal(grammar.random_tokens(9, generator(1)), grammar.random_tokens(9, generator(1)))


def test_text_vectors() -> None:
    encoder = ToyTextEncoder(text_dim=grammar.VOCABULARY_SIZE + 5)
    prompts = ["a red circle moving up", ToyPrompt("blue", "plus", "down", "large", "fast")]
    text = encoder.encode(prompts)
    assert text.shape == (2, grammar.PROMPT_TOKENS, encoder.text_dim) and text.dtype == torch.float32
    assert torch.allclose(text.square().mean(-1).sqrt(), torch.ones(2, grammar.PROMPT_TOKENS))
    gram = encoder.vectors @ encoder.vectors.T / encoder.text_dim
    assert torch.allclose(gram, torch.eye(grammar.VOCABULARY_SIZE))
    null = encoder.unconditional(3)
    assert null.shape == (3, grammar.PROMPT_TOKENS, encoder.text_dim)
    assert (null[0] * text[0]).sum() == 0 and (null.abs().sum(-1) > 0).all()
    with pytest.raises(ValueError, match="vocabulary size"):
        ToyTextEncoder(grammar.VOCABULARY_SIZE - 1)
    with pytest.raises(TypeError):
        encoder.encode("a red circle moving up")


def test_a_free_speed_is_not_told() -> None:
    prompted, free = ToyTextEncoder(32), ToyTextEncoder(32, free_speed=True)
    tokens = grammar.token_table([ToyPrompt("blue", "plus", "down", "large", word) for word in grammar.SPEEDS])
    before = tokens.clone()
    text = free.encode_tokens(tokens)
    assert torch.equal(tokens, before) and torch.equal(text[:, :4], prompted.encode_tokens(tokens)[:, :4])
    assert torch.equal(text[:, 4], prompted.unconditional(3)[:, 4])
    free, varied = ToyWorld(WORLDS["free_speed"]), ToyWorld(VARIED)
    assert free.sample_scenes(4, generator(3)) == varied.sample_scenes(4, generator(3))
    assert torch.equal(free.velocities(tokens), varied.velocities(tokens)), "videos move as fast as their own word says"
    assert torch.allclose(free.expected_velocities(tokens), varied.velocities(tokens).mean(0))
    assert torch.equal(varied.expected_velocities(tokens), varied.velocities(tokens))


# World


@settings(max_examples=25, deadline=None)
@given(PROMPTS, st.floats(0, 32), st.floats(0, 32), st.integers(0, 500), st.integers(1, 4))
def test_frames_do_not_depend_on_the_stretch(
    world: ToyWorld, prompt: ToyPrompt, x: float, y: float, first: int, count: int
) -> None:
    scene = Scene(prompt, x, y)
    frames = world.render(scene, first, count)
    assert frames.shape == (count, 3, 32, 32) and frames.dtype == torch.float32
    assert frames.abs().max() <= 1
    longer = world.render(scene, first - 2, count + 3)[2:-1]
    assert torch.allclose(frames, longer, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(PROMPTS, st.integers(0, 31), st.integers(0, 31))
def test_world_is_a_torus(world: ToyWorld, prompt: ToyPrompt, right: int, down: int) -> None:
    """Moving the start by whole pixels rolls the frame around both edges."""
    middle = world.render(Scene(prompt, 16.25, 15.5), 0, 1)
    moved = world.render(Scene(prompt, 16.25 + right, 15.5 + down), 0, 1)
    assert torch.allclose(moved, middle.roll((down, right), (2, 3)), atol=1e-5)
    again = world.render(Scene(prompt, 16.25 - 32, 15.5 + 64), 0, 1)
    assert torch.allclose(again, middle, atol=1e-5)


def test_motion_is_the_prompted_one(world: ToyWorld) -> None:
    """Directions and speeds as in the config, and after one turn around the torus the frame is back."""
    for direction, signs in (("right", (1, 0)), ("left", (-1, 0)), ("up", (0, -1)), ("down and left", (-1, 1))):
        for speed, pixels in zip(grammar.SPEEDS, world.config.speeds, strict=True):
            prompt = ToyPrompt("cyan", "plus", direction, speed=speed)
            velocity = world.velocities(torch.tensor([prompt.tokens()]))[0].tolist()
            assert math.hypot(*velocity) == pytest.approx(pixels)
            assert tuple((v > 1e-9) - (v < -1e-9) for v in velocity) == signs
    prompt = ToyPrompt("cyan", "plus", "right", speed="fast")
    frames = ToyWorld(WorldConfig(speeds=(0.5, 1.0, 2.0))).render(Scene(prompt, 3.0, 4.0), 0, 17)
    assert torch.allclose(frames[0], frames[16], atol=1e-6) and not torch.allclose(frames[0], frames[8], atol=0.1)


def test_shapes_have_the_same_area(world: ToyWorld) -> None:
    centre = torch.tensor([[16.0, 16.0]])
    for size, radius in enumerate(world.radii):
        want = math.pi * float(radius) ** 2
        for shape in range(len(grammar.SHAPES)):
            area = float(world.coverage(shape, radius[None], centre).sum())
            assert area == pytest.approx(want, rel=0.05), (grammar.SHAPES[shape], grammar.SIZES[size])


def test_samples_are_deterministic(world: ToyWorld) -> None:
    first, again = (world.sample_batch(8, 12, generator(7)) for _ in range(2))
    assert torch.equal(first.videos, again.videos) and first.scenes == again.scenes
    assert torch.equal(first.tokens, grammar.token_table(first.prompts))
    assert first.videos.shape == (8, 12, 3, 32, 32)
    for video, scene in zip(first.videos, first.scenes, strict=True):
        assert max(abs(scene.x - 16), abs(scene.y - 16)) <= world.config.start_jitter
        assert torch.allclose(video, world.render(scene, 0, 12), atol=1e-6)
    starts = world.sample_starts(500, generator(), "anywhere")
    assert starts.min() < 1 and starts.max() > 31
    pool = world.sample_batch(20, 1, generator(), pool=[PROMPT])
    assert set(pool.prompts) == {PROMPT}
    with pytest.raises(ValueError, match="start must be"):
        world.sample_batch(1, 1, generator(), start="corner")  # type: ignore[arg-type]


def test_far_frames_cost_and_look_like_near_ones(world: ToyWorld) -> None:
    scene = Scene(ToyPrompt("white", "square", "down", speed="fast"), 5.0, 6.0)
    period = 160  # frames: 1.8 * 160 = 9 * 32 pixels
    far = world.render(scene, 1_000_000 - 1_000_000 % period, 4)
    assert torch.allclose(far, world.render(scene, 0, 4), atol=1e-4)


def test_frames_are_rendered_at_once(world: ToyWorld) -> None:
    """Training draws every batch anew: it must not be felt."""
    world.sample_batch(16, 12, generator())
    short, long = (count_calls(lambda n=frames: world.sample_batch(16, n, generator())) for frames in (12, 96))
    assert long <= short


def test_config_is_checked() -> None:
    with pytest.raises(ValueError, match="overlap itself"):
        WorldConfig(radii=(4.0, 6.0, 12.0))
    with pytest.raises(ValueError, match="speeds needs 3 entries"):
        WorldConfig(speeds=(1.0,))
    with pytest.raises(ValueError, match="positive"):
        WorldConfig(height=0)
    with pytest.raises(ValueError, match=r"texture 0.1 and light 0.1 must be at least 0 and keep"):
        WorldConfig(backgrounds=((0.15,) * 3, (0.5,) * 3), texture=0.1, light=0.1)
    wide = ToyWorld(WorldConfig(height=48, width=80)).sample_batch(2, 3, generator())
    assert wide.videos.shape == (2, 3, 3, 48, 80)


# The varied world


VARIED, SCENES = WORLDS["varied"], WORLDS["scenes"]


def test_the_plain_world_draws_nothing_more() -> None:
    """What a world varies is drawn last: the plain world's samples, and what follows them, stay what they were."""
    plain, varied, lit, after = generator(7), generator(7), generator(7), generator(7)
    a = ToyWorld(WORLDS["plain"]).sample_batch(8, 2, plain)
    b = ToyWorld(VARIED).sample_batch(8, 2, varied)
    c = ToyWorld(SCENES).sample_batch(8, 2, lit)
    assert torch.equal(a.tokens, b.tokens)
    assert [(s.x, s.y) for s in a.scenes] == [(s.x, s.y) for s in b.scenes]
    assert [s.texture.wave for s in b.scenes] == [
        s.texture.wave for s in c.scenes
    ]  # light and distractor are drawn last
    assert all(scene.light is None and scene.distractor is None for scene in b.scenes)
    grammar.random_tokens(8, after)
    torch.rand(8, 2, generator=after, dtype=torch.float64)
    assert torch.equal(plain.get_state(), after.get_state())
    assert all(scene.background is None and scene.texture is None for scene in a.scenes)
    assert WORLDS["plain"] == WorldConfig()


def test_backgrounds_textures_and_lights_fill_what_the_config_says() -> None:
    scenes = ToyWorld(SCENES).sample_scenes(2000, generator(1))
    assert SCENES.backgrounds is not None
    colours = torch.tensor([scene.background for scene in scenes])
    for channel, low, high in zip(colours.T, *SCENES.backgrounds, strict=True):
        assert low <= channel.min() < low + 0.01 and high - 0.01 < channel.max() <= high
        assert float(channel.std()) == pytest.approx((high - low) / math.sqrt(12), rel=0.05)
    for name, waves in (("texture", WAVES), ("light", LIGHT_WAVES)):
        gratings = [getattr(scene, name) for scene in scenes]
        amplitudes = torch.tensor([grating.amplitude for grating in gratings]) / getattr(SCENES, name)
        assert FAINTEST <= amplitudes.min() < FAINTEST + 0.01 and 0.99 < amplitudes.max() <= 1
        assert {grating.wave for grating in gratings} == set(waves)
        assert max(grating.phase for grating in gratings) > 6.2


def test_a_scene_renders_as_it_says() -> None:
    """By hand: background and cosine where nothing is, the palette's colour in the middle of the shape."""
    world = ToyWorld(VARIED)
    scene = Scene(PROMPT, 8.0, 8.0, (0.3, 0.2, 0.4), Grating(0.1, (3, 2), 0.5), Grating(0.05, (1, 0), 2.0))
    frame = (world.render(scene, 0, 1)[0] + 1) / 2
    for x, y in ((20, 20), (31, 0), (17, 30)):
        wave = 0.1 * math.cos(2 * math.pi * (3 * (x + 0.5) + 2 * (y + 0.5)) / 32 + 0.5)
        wave += 0.05 * math.cos(2 * math.pi * (x + 0.5) / 32 + 2)
        assert frame[:, y, x].tolist() == pytest.approx([0.3 + wave, 0.2 + wave, 0.4 + wave], abs=1e-5)
    assert frame[:, 8, 8].tolist() == pytest.approx(VARIED.palette[grammar.COLOURS.index("red")], abs=1e-5)
    far = world.render(scene, 1_000_000, 2)  # the background stands still
    behind = world.coverage(0, world.radii[1:2], world.centres(grammar.token_table([PROMPT]),
                            torch.tensor([[8.0, 8.0]]), 1, 1_000_000)[0])[0] == 0  # fmt: skip
    assert torch.allclose(far[0][:, behind], 2 * world.backdrops([scene])[0][:, behind] - 1, atol=1e-6)
    flat = world.render(Scene(PROMPT, 8.0, 8.0), 0, 1)  # no background of its own: the world's
    assert torch.equal(flat, ToyWorld().render(Scene(PROMPT, 8.0, 8.0), 0, 1))


def test_a_second_shape_crosses_behind_the_first() -> None:
    world, dark = ToyWorld(SCENES), SCENES.distractor
    assert dark is not None
    alone = Scene(PROMPT, 16.0, 16.0, (0.3, 0.2, 0.4))
    scene = dataclasses.replace(alone, distractor=Distractor(grammar.SHAPES.index("circle"), 4.0, 16.0, (1.5, 0.0)))
    both, one = ((world.render(s, 0, 9) + 1) / 2 for s in (scene, alone))
    assert both[0, :, 15, 3].tolist() == pytest.approx(list(dark), abs=1e-6)
    assert torch.equal(both[0, :, 16, 14:19], one[0, :, 16, 14:19])  # the prompted one, not yet reached
    met = both[8]  # one circle is at x = 16 + 8 * 1.1, the other at 16
    assert met[:, 16, 24].tolist() == pytest.approx(SCENES.palette[grammar.COLOURS.index("red")], abs=1e-6)
    assert met[:, 15, 15].tolist() == pytest.approx(list(dark), abs=1e-6)
    still = dataclasses.replace(scene, x=16 - 8 * 1.1)  # they meet in frame 8: the prompted one is in front
    hidden, plain = (
        world.render(s, 8, 1)[0, :, 13:19, 13:19] for s in (still, dataclasses.replace(still, distractor=None))
    )
    torch.testing.assert_close(hidden, plain, rtol=0, atol=1e-6)
    kinds = [one.distractor for one in world.sample_scenes(500, generator(3))]
    assert {kind.shape for kind in kinds} == set(range(len(grammar.SHAPES)))
    assert len({kind.velocity for kind in kinds}) == 24  # eight directions at three speeds
    assert min(kind.x for kind in kinds) < 1 and max(kind.y for kind in kinds) > 31


@pytest.mark.parametrize("config", [VARIED, SCENES])
def test_scenes_render_together_as_alone(config) -> None:
    world = ToyWorld(config)
    scenes = [*world.sample_scenes(5, generator(2)), Scene(PROMPT, 1.0, 2.0)]
    together = world.render_scenes(scenes, 3, first_frame=4)
    for video, scene in zip(together, scenes, strict=True):
        assert torch.allclose(video, world.render(scene, 4, 3), atol=1e-6)
    with pytest.raises(ValueError, match="no scene"):
        world.render_scenes([], 3)
    sample = world.sample_batch(5, 2, generator(2))
    assert sample.scenes == scenes[:5]
    assert torch.equal(sample.videos, world.render_scenes(scenes[:5], 2))
    tall = ToyWorld(dataclasses.replace(config, height=48)).sample_batch(2, 3, generator())
    assert tall.videos.shape == (2, 3, 3, 48, 32)


def test_varied_config_is_checked() -> None:
    grey, light = (0.2, 0.2, 0.2), (0.6, 0.6, 0.6)
    for wrong in ((light, grey), ((0.2, 0.2), (0.6, 0.6))):
        with pytest.raises(ValueError, match="low <= high"):
            WorldConfig(backgrounds=wrong)  # type: ignore[arg-type]
    for texture in (-0.1, 0.21):
        with pytest.raises(ValueError, match=r"texture .* in \[0, 1\]"):
            WorldConfig(backgrounds=(grey, light), texture=texture)
    with pytest.raises(ValueError, match="in .0, 1."):
        WorldConfig(backgrounds=(grey, (1.2, 1.2, 1.2)))
    assert WorldConfig(backgrounds=(grey, light), texture=0.2).texture == 0.2


# Codec


def psnr(frames: torch.Tensor, truth: torch.Tensor) -> float:
    return float(-10 * ((frames - truth) / 2).square().mean().log10())


def test_codec_quality_and_scale(world: ToyWorld, codec: ToyCodec) -> None:
    frames = world.sample_batch(500, 1, generator(1), start="anywhere").videos
    latents = codec.encode(frames)
    assert latents.shape == (500, 1, *codec.latent_shape(32, 32)) == (500, 1, 16, 8, 8)
    assert latents.dtype == torch.float32
    assert 0.9 < float(latents.square().mean().sqrt()) < 1.1
    decoded = codec.decode(latents)
    assert decoded.shape == frames.shape and decoded.abs().max() <= 1
    assert psnr(decoded, frames) > 35


def test_codec_keeps_the_varied_world() -> None:
    frames = ToyWorld(VARIED).sample_batch(300, 1, generator(1), start="anywhere").videos
    codec = fit_once(VARIED)
    assert psnr(codec.decode(codec.encode(frames)), frames) > 36


def test_the_codec_of_larger_frames_makes_the_same_latents(codec: ToyCodec, large_codec: ToyCodec) -> None:
    large = ToyWorld(WORLDS["scenes_64"]).sample_batch(100, 1, generator(1), start="anywhere").videos
    small = ToyWorld(SCENES).sample_batch(100, 1, generator(1), start="anywhere").videos
    latents, same = large_codec.encode(large), codec.encode(small)
    assert (large_codec.patch, large.shape[-2:]) == (16, (64, 64)) and latents.shape == same.shape
    # 0.002 was measured; 1.2 with the leading components as they come
    assert (latents - same).square().mean() < 0.004 * same.square().mean()
    assert psnr(large_codec.decode(latents), large) > 35
    assert codec.for_size(VARIED) is codec
    with pytest.raises(ValueError, match="shorter side must be a multiple of 32 pixels, got 48x48"):
        codec.for_size(WorldConfig(height=48, width=48))


@pytest.mark.parametrize(("patch", "split", "floor"), [(8, 2, 33.0), (4, 1, 31.0), (8, 1, 15.0)])
def test_codec_layouts(world: ToyWorld, patch: int, split: int, floor: float) -> None:
    frames = world.sample_batch(60, 2, generator(1), start="anywhere").videos
    small = ToyCodec.fit(channels=12, patch=patch, split=split, frames=1000)
    latents = small.encode(frames)
    assert latents.shape[2:] == (12, 32 // small.cell, 32 // small.cell)
    assert 0.85 < float(latents.square().mean().sqrt()) < 1.15
    assert psnr(small.decode(latents), frames) > floor
    faint = 0.05 * torch.randn(latents.shape, generator=generator())  # far from the clamp
    assert torch.allclose(small.encode(small.decode(faint)), faint, atol=1e-4)


def test_codec_tokens_are_local(world: ToyWorld, codec: ToyCodec) -> None:
    """A square of split x split latents sees its own patch of pixels and nothing else."""
    frames = world.sample_batch(1, 2, generator(2)).videos
    changed = frames.clone()
    changed[0, 1, :, 8:16, 16:24] = 0.3
    difference = (codec.encode(changed) - codec.encode(frames)).abs().amax((0, 2))
    assert difference[1, 2:4, 4:6].min() > 0
    difference[1, 2:4, 4:6] = 0
    assert difference.max() == 0


def test_codec_state(codec: ToyCodec) -> None:
    state = codec.state_dict()
    assert all(tensor.is_contiguous() for tensor in state.values())
    again, refit = ToyCodec.from_state(state), ToyCodec.fit()
    latents = torch.randn(1, 2, 16, 8, 8, generator=generator())
    assert torch.equal(again.decode(latents), codec.decode(latents))
    assert torch.equal(refit.decode(latents), codec.decode(latents))
    with pytest.raises(ValueError, match="lacks scale"):
        ToyCodec.from_state({name: state[name] for name in ("mean", "basis", "layout")})
    with pytest.raises(ValueError, match="do not fit"):
        ToyCodec.from_state(state | {"mean": torch.zeros(7)})


def test_codec_refuses_bad_sizes(codec: ToyCodec) -> None:
    for frames in (torch.zeros(1, 1, 3, 30, 32), torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 4, 32, 32)):
        with pytest.raises(ValueError):
            codec.encode(frames)
    for latents in (torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 1, 16, 7, 8), torch.zeros(1, 16, 8, 8)):
        with pytest.raises(ValueError):
            codec.decode(latents)


def test_to_uint8() -> None:
    frames = torch.tensor([-2.0, -1.0, 1.0]).reshape(1, 3, 1, 1)
    assert ToyCodec.to_uint8(frames).tolist() == [[[[0, 0, 255]]]]
