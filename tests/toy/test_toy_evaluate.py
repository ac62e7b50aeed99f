"""The toy evaluation: full marks for the truth, every decline reported as it is, and the command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable

import pytest
import small_toy
import torch
from small_toy import BLOCK, SIDE, WINDOW, small_folder, small_model  # noqa: F401 (fixtures)
from torch import Tensor

from hiar_model import Rollout, load_video_model
from hiar_model.cli import main
from hiar_model.config import RolloutConfig
from hiar_model.evaluation import evaluate
from hiar_model.evaluation.diversity import Diversity
from hiar_model.evaluation.evaluate import PARTS, evaluate_toy
from hiar_model.models.registry import VideoModel
from hiar_model.models.transformer import HiARTransformer
from hiar_model.schedule.plan import Plan, forwards
from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.oracle import ToyOracle
from hiar_model.toy.prompt import SPEEDS, parse, split_prompts
from hiar_model.toy.reading import Reading
from hiar_model.toy.world import WORLDS, Grating, Scene, ToyWorld, WorldConfig

pytestmark = pytest.mark.cpu

PROMPTS = split_prompts()[1][:8]
BACKGROUND, TEXTURE = (0.3, 0.2, 0.4), Grating(0.08, (2, 2), 1.0)


def form(order: str, **changes) -> RolloutConfig:
    """That of the small model, in an order."""
    return RolloutConfig((1000, 500), 2.0, order, BLOCK, **{"window_frames": WINDOW, **changes})


def latents(model: VideoModel, config: RolloutConfig, frames: int, seed: int, prompt: str = small_toy.PROMPT) -> Tensor:
    sizes = {"num_latent_frames": frames, "latent_size": (8, 8), "seed": seed}
    return torch.cat([b.latents for b in Rollout(model.transformer, model.encode_text(prompt), config, **sizes)], 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Shown:
    """Decodes nothing: shows a scene, frame i as `change(scene, i)` says."""

    def __init__(self, scene: Scene, change: Callable[[Scene, int], Scene], world: WorldConfig) -> None:
        self.scene, self.change, self.world = scene, change, ToyWorld(world)

    def decode(self, latents: Tensor):
        scenes = (self.change(self.scene, i) for i in range(latents.shape[1]))
        return ToyCodec.to_uint8(torch.cat([self.world.render(s, i, 1) for i, s in enumerate(scenes)])).numpy()


def showing(
    model: VideoModel,
    world: str = "plain",
    scene: Callable[[str], Scene] = lambda prompt: Scene(parse(prompt), SIDE / 2, SIDE / 2),
    change: Callable[[Scene, int], Scene] = lambda scene, i: scene,
    pick: int = 0,
) -> VideoModel:
    """The model with a decoder that shows what `scene` makes of the encoded prompts, first (pick 0) or last (-1)."""
    encoded: list[str] = []

    def listen(prompt: str) -> Tensor:
        encoded.append(prompt)
        return model.text_encoder(prompt)

    return dataclasses.replace(
        model,
        text_encoder=listen,
        world=WORLDS[world],
        new_decoder=lambda: Shown(scene(encoded.pop(pick)), change, WORLDS[world]),
    )


def drawn(seed: int) -> Callable[[str], Scene]:
    """Scenes of the varied world, drawn one after another."""
    source, world = generator(seed), ToyWorld(WORLDS["varied"])
    return lambda prompt: world.sample_scenes(1, source, pool=[parse(prompt)])[0]


# Videos of which the truth is known


def test_evaluation_of_the_truth(model):
    """A decoder that shows the prompts must get full marks; one that shows them in another's place must not."""
    seen = []
    options = {"num_frames": [6, 24], "rollouts": [form("stream")], "batch": 3}
    rows = evaluate_toy(showing(model), PROMPTS, **options, on_videos=lambda *n: seen.append(n))
    assert seen == [(3, 8), (6, 8), (8, 8)]  # the shorter videos are the beginnings of the longer ones
    assert [(row.rollout.order, row.num_frames, row.videos, len(row.parts)) for row in rows] == [
        ("stream", 6, 8, PARTS), ("stream", 24, 8, PARTS),
    ]  # fmt: skip
    for row in rows:
        assert row.whole.colour == row.whole.valid == row.whole.direction == 1
        assert row.whole.speed_ratio == pytest.approx(1, abs=0.02)
        assert all(part.valid == 1 for part in row.parts) and row.drift == 0 and row.diversity is None
    assert evaluate_toy(showing(model, pick=-1), PROMPTS, **options)[0].whole.valid < 0.6


def test_every_decline_is_told_as_it_is(model):
    """Background 0.01 a frame away, texture down to half, half the speed, and another colour in the last eighth."""

    def decline(scene: Scene, frame: int) -> Scene:
        red, green, blue = BACKGROUND
        away = 0.01 * max(0, frame - 2)
        prompt = scene.prompt if frame < 21 else dataclasses.replace(scene.prompt, colour="white")
        velocity = ToyWorld().velocities(torch.tensor([scene.prompt.tokens()]))[0].tolist()
        x, y = (at - v * frame / 2 for at, v in zip((scene.x, scene.y), velocity, strict=True))
        texture = dataclasses.replace(TEXTURE, amplitude=0.08 if frame < 12 else 0.04)
        return Scene(prompt, x, y, (red + away, green - away / 2, blue - away / 2), texture)

    prompts = [prompt for prompt in PROMPTS if prompt.colour != "white"]
    (row,) = evaluate_toy(
        showing(model, "varied", change=decline), prompts, num_frames=[24], rollouts=[form("block_first")], parts=8
    )
    assert [part.valid for part in row.parts] == [1.0] * 7 + [0.0] and row.drift == -1
    assert [part.colour for part in row.parts] == [1.0] * 7 + [0.0] and row.whole.shape == 1
    assert row.whole.direction == 1 and row.whole.speed_ratio == pytest.approx(0.5, abs=0.02)
    change = math.sqrt((1 + 0.25 + 0.25) / 3) * 0.01
    for i, part in enumerate(row.parts):
        away = sum(max(0, frame - 2) for frame in range(3 * i, 3 * i + 3)) / 3
        assert part.background_change == pytest.approx(change * away, abs=0.003)
        for texture in (part.texture_ratio, part.texture_kept):
            assert texture == pytest.approx(1 if i < 4 else 0.5, abs=0.03)


def test_diversity_of_the_world_is_one_and_of_a_constant_none(model):
    options = {"num_frames": [BLOCK], "rollouts": [form("stream")], "parts": 1, "seeds": 12}
    (row,) = evaluate_toy(showing(model, "varied", drawn(0)), PROMPTS, **options)
    assert row.diversity.background == pytest.approx(1, abs=0.15)
    assert row.diversity.texture == pytest.approx(1, abs=0.15)
    assert row.diversity.start == pytest.approx(1, abs=0.15)
    scene = Scene(PROMPTS[0], SIDE / 2, SIDE / 2, BACKGROUND, TEXTURE)
    (row,) = evaluate_toy(showing(model, "varied", lambda prompt: scene), PROMPTS[:2], **options)
    assert dataclasses.astuple(row.diversity) == pytest.approx((0, 0, 0, math.nan), abs=1e-3, nan_ok=True)
    (row,) = evaluate_toy(showing(model, change=lambda s, _: dataclasses.replace(s, x=s.x)), PROMPTS[:1], **options)
    assert math.isnan(row.diversity.background) and math.isnan(row.diversity.texture) and row.diversity.start < 0.05


def test_a_speed_that_no_prompt_tells(model):
    """It counts over the world's mean speed, and is one more thing in which the videos of a prompt differ."""
    speeds = itertools.cycle(SPEEDS)

    def scene(prompt: str) -> Scene:
        return Scene(dataclasses.replace(parse(prompt), speed=next(speeds)), SIDE / 2, SIDE / 2, BACKGROUND, TEXTURE)

    options = {"num_frames": [BLOCK], "rollouts": [form("stream")], "parts": 1, "seeds": 3}
    (row,) = evaluate_toy(showing(model, "free_speed", scene), PROMPTS[:5], **options)
    slow, medium, fast = WORLDS["free_speed"].speeds
    mean = (slow + medium + fast) / 3
    assert row.whole.speed_ratio == pytest.approx((2 * slow + 2 * medium + fast) / 5 / mean, abs=0.03)
    assert row.whole.direction == 1
    assert row.diversity.speed == pytest.approx(math.sqrt(3 / 2), abs=0.03)  # each prompt was seen at each speed


def readings(*scenes: Scene) -> list[Reading]:
    oracle, world = ToyOracle(WORLDS["varied"]), ToyWorld(WORLDS["varied"])
    return [oracle.evaluate(world.render(scene, 0, 3), scene.prompt) for scene in scenes]


def test_diversity_by_hand():
    """Two seeds that differ by d have the variance d^2 / 2, and each prompt is a group of its own."""
    world, prompt = WORLDS["varied"], PROMPTS[0]
    one = Scene(prompt, 16.0, 16.0, (0.2, 0.2, 0.2), TEXTURE)
    other = dataclasses.replace(one, x=16.4, background=(0.3, 0.2, 0.2))
    far = dataclasses.replace(one, background=(0.4, 0.3, 0.4))
    diversity = Diversity.of(world, [readings(one, other), readings(far, far)])
    assert diversity.background == pytest.approx(
        math.sqrt((0.1**2 / 2 / 2) / ((0.32**2 + 0.22**2 + 0.32**2) / 12)), rel=0.02
    )
    assert diversity.start == pytest.approx(math.sqrt((0.4**2 / 2 / 2) / (2 * 0.5**2 / 3)), rel=0.1)
    assert diversity.texture == pytest.approx(0, abs=0.03)
    nothing = dataclasses.replace(readings(one)[0], background=torch.full((3, 3), math.nan))
    diversity = Diversity.of(world, [[nothing, *readings(one, other)]])
    of_world = (0.32**2 + 0.22**2 + 0.32**2) / 12
    assert diversity.background == pytest.approx(math.sqrt((0.1**2 / 2) / of_world), rel=0.02)
    with pytest.raises(ValueError, match="two seeds"):
        Diversity.of(world, [readings(one)])


# Rollouts


@pytest.mark.parametrize("order", ["stream", "block_first", "step_first"])
def test_a_shorter_video_is_the_beginning_of_the_longer_one(model, order):
    """So that one rollout serves all lengths; exactly, once both fill the window."""
    short, long = (latents(model, form(order), frames, 5) for frames in (12, 27))
    assert torch.equal(short, long[:, :12])


def test_lengths_of_one_rollout_are_those_of_single_ones(model):
    options = {"rollouts": [form("block_first")], "parts": 2}
    both = evaluate_toy(model, PROMPTS[:3], num_frames=[12, 27], **options)
    single = [evaluate_toy(model, PROMPTS[:3], num_frames=[n], **options)[0] for n in (12, 27)]
    assert [row.to_dict() for row in both] == [row.to_dict() for row in single]


def test_evaluation_does_not_depend_on_the_batch(model):
    options = {"num_frames": [6], "rollouts": [form("step_first")]}
    rows = [evaluate_toy(model, PROMPTS[:3], **options, batch=n)[0] for n in (1, 3)]
    a, b = (dataclasses.asdict(row.whole) for row in rows)
    assert a == pytest.approx(b, rel=1e-3, nan_ok=True)


def recording(model: VideoModel, decoded: list[Tensor]) -> VideoModel:
    """The model with a decoder that keeps the latents."""

    class Listen:
        def decode(self, latents: Tensor):
            decoded.append(latents)
            return model.decoder().decode(latents)

    return dataclasses.replace(model, new_decoder=Listen)


def test_rollouts_are_the_models_or_those_given(model):
    """KV source, windows and order reach the rollout."""
    config = dataclasses.replace(model.transformer.config, num_layers=2)  # keys of a first layer know no context
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = dataclasses.replace(model, transformer=HiARTransformer(config).eval().requires_grad_(False))
    own = dataclasses.replace(model, rollout=form("stream", kv_source="next_step", window_frames=(4, 9)))
    decoded: list[Tensor] = []
    (row,) = evaluate_toy(recording(own, decoded), PROMPTS[:1], num_frames=[18], seed=3)
    assert row.rollout == own.rollout and row.to_dict()["rollout"] == own.rollout.to_dict()
    other = form("block_first", window_frames=6)
    (row,) = evaluate_toy(recording(own, decoded), PROMPTS[:1], num_frames=[18], seed=3, rollouts=[other])
    assert row.rollout == other
    for actual, rollout in zip(decoded, (own.rollout, other), strict=True):
        assert torch.equal(actual, latents(model, rollout, 18, 3, PROMPTS[0].text()))
    decoded.clear()  # the video, and its first block of each seed
    evaluate_toy(recording(own, decoded), PROMPTS[:1], num_frames=[18], seed=3, seeds=2)
    for actual, frames, seed in zip(decoded, (18, BLOCK, BLOCK), (3, 3, 4), strict=True):
        assert torch.equal(actual, latents(model, own.rollout, frames, seed, PROMPTS[0].text()))
    rows = evaluate_toy(model, PROMPTS[:1], num_frames=[6])
    assert [row.rollout.order for row in rows] == ["step_first", "block_first"]


@pytest.mark.parametrize(
    ("order", "source", "windows", "count"),
    [
        ("stream", "own", (9, 9), 4), ("step_first", "own", (9, 9), 4), ("block_first", "own", (9, 9), 3),
        ("stream", "next_step", (9, 9), 3), ("stream", "own", (3, 9), 3), ("stream", "own", (None, None), 4),
    ],
)  # fmt: skip
def test_forwards_of_a_block_are_those_of_the_walk(model, order, source, windows, count):
    """Against one more block of a long walk; nobody reads the cache of a window that holds only the block itself."""
    config = form(order, kv_source=source, window_frames=windows)
    (row,) = evaluate_toy(model, PROMPTS[:1], num_frames=[6], rollouts=[config])
    plan = Plan.of(config)
    walked = [forwards(plan.groups(n)) for n in (20, 21)]
    assert row.forwards == walked[1] - walked[0] == count
    if windows == (9, 9):
        assert row.visible_frames == 9
    if windows == (3, 9):
        assert row.visible_frames == pytest.approx((3 + 9 + 9) / 3)


def test_illegal_evaluations(model):
    for wrong, message in (
        ({"prompts": []}, "at least one prompt"),
        ({"batch": 0}, "at least one prompt"),
        ({"num_frames": [3]}, "parts must be at most the frames of a video, 3, got 6"),
        ({"num_frames": [6], "parts": 7}, "parts must be at most the frames of a video, 6, got 7"),
        ({"num_frames": [7]}, "nearest 6 or 9"),
        ({"num_frames": []}, "at least one length"),
        ({"parts": 0}, "parts must be a whole number of at least 1, got 0"),
        ({"seeds": 1}, "seeds must be 0 .* got 1"),
        ({"model": dataclasses.replace(model, world=None)}, "shows no toy world"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_toy(**{"model": model, "prompts": PROMPTS[:1], "num_frames": [6], **wrong})


def test_the_folder_says_how_it_is_rolled_out(folder, model, tmp_path):
    """Folders of before 0.2 spell single options; those that cannot be are refused."""
    config = json.loads((folder / "config.json").read_text())
    assert RolloutConfig.from_dict(config["rollout"]) == model.rollout == form("step_first")

    def load(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        return load_video_model(tmp_path, "cpu")

    new = load({**config, "rollout": form("wavefront", kv_source="next_step").to_dict()})
    assert new.rollout == form("wavefront", kv_source="next_step")
    old = {key: value for key, value in config.items() if key != "rollout"}
    old |= {"frames_per_block": BLOCK, "window_frames": WINDOW, "sink_frames": 0}
    old["schedule"] = {"steps": [1000, 500], "shift": 2.0}
    assert load(old).rollout == model.rollout
    assert load({**old, "cache_source": "next_step", "order": "wavefront"}).rollout == new.rollout
    for changes, message in (
        ({"order": "x"}, "order must be one of step_first, .* got 'x'"),
        ({"cache_source": "x"}, "kv_source must be one of own, next_step, got 'x'"),
        ({"cache_source": "next_step"}, "kv_source='next_step' is impossible with .*: use stream or wavefront"),
        ({"caches": 1}, "unknown key caches; known: "),
    ):
        with pytest.raises(ValueError, match=message):
            load({**old, **changes})


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(folder), "--prompts", "2", "--num-frames", "[6,12]", "--order", "[stream]",
               "--kv-source", "next_step", "--window-frames", "6", "--parts", "3", "--seeds", "2"]  # fmt: skip
    drawn = []
    monkeypatch.setattr(evaluate, "save_plot", lambda panels, path: drawn.append((panels, str(path))))
    assert main(["evaluate", "toy", *options, "--json", "a.json", "--plot", "a.png"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("\nplot: a.png\n")
    assert "by 1/3" in shown and "| stream |     12 |" in shown and "diversity of first blocks" in shown
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["num_frames"] for row in rows] == [6, 12]
    ((panels, path),) = drawn
    assert path == "a.png" and [panel.title.rpartition(" of ")[2] for panel in panels[::2]] == ["6 frames", "12 frames"]
    for row, panel in zip(rows, panels[::2], strict=True):
        (line,) = panel.series
        assert line.label == "stream" and list(line.x) == [1, 2, 3]
        assert line.y == [100 * part["valid"] for part in row["parts"]]
    assert rows[0]["rollout"] == form("stream", kv_source="next_step", window_frames=6).to_dict()
    (tmp_path / "old.png").touch()
    for words, message in (
        (["--order", "step_first", "--kv-source", "next_step"], "kv_source='next_step' is impossible with order="),
        (["--order", "stream", "--window-frames", "[6,6,6]"], "one per step (2)"),
        (["--window-frames", "2"], "window_frames must be a whole number of at least 3"),
        (["--json", "no/a.json"], "cannot write no/a.json"),
        (["--plot", "a.jpg"], "cannot write a.jpg: a plot is a PNG, legal: name.png"),
        (["--json", "a.json"], "--json a.json exists: give another name, or --overwrite"),
        (["--plot", "old.png"], "--plot old.png exists: give another name, or --overwrite"),
        (["--num-frames", "[6,12,6]"], "--num-frames must hold each once, got 6 2 times"),
        (["--order", "[stream,stream]"], "--order must hold each once, got stream 2 times"),
    ):
        assert main(["evaluate", "toy", "--model", str(folder), *words]) == 2
        assert message.replace("_", "-") in capsys.readouterr().err.replace("_", "-")


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["--num-frames", "6", "--order", "block_first"], [("block_first", "6")]),
        (["--num-frames", "[6,12]", "--order", "stream"], [("stream", "6"), ("stream", "12")]),
        (["--num-frames", "6"], [("step_first", "6"), ("block_first", "6")]),
    ],
    ids=str,
)
def test_one_length_or_order_needs_no_list(folder, capsys, words, rows):
    assert main(["evaluate", "toy", "--model", str(folder), "--prompts", "1", "--parts", "1", *words]) == 0
    shown = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [(order.strip(), frames.strip()) for order, frames in shown] == rows
