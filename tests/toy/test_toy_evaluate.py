"""The toy evaluation: full marks for the truth, every decline told as it is, and the table over variants and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence

import pytest
import small_toy
import torch
from small_toy import BLOCK, SIDE, WINDOW
from torch import Tensor

from hiar_model import load_video_model, rollout
from hiar_model.cli import main
from hiar_model.evaluation.diversity import Diversity
from hiar_model.evaluation.evaluate import PARTS, evaluate_toy
from hiar_model.evaluation.table import table
from hiar_model.models.registry import VideoModel
from hiar_model.models.transformer import HiARTransformer
from hiar_model.schedule.plan import Plan, forwards
from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.oracle import ToyOracle
from hiar_model.toy.prompt import SPEEDS, parse, split_prompts
from hiar_model.toy.reading import Reading
from hiar_model.toy.world import WORLDS, Scene, Texture, ToyWorld, WorldConfig

pytestmark = pytest.mark.cpu

PROMPTS = split_prompts()[1][:8]
BACKGROUND, TEXTURE = (0.3, 0.2, 0.4), Texture(0.08, (2, 2), 1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_toy.write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def model(folder):
    return load_video_model(folder, "cpu")


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
    """The model with a decoder that shows what `scene` makes of the prompts asked, in turn (pick 0) or not (-1)."""
    asked: list[str] = []

    def listen(prompt: str) -> Tensor:
        asked.append(prompt)
        return model.text_encoder(prompt)

    return dataclasses.replace(
        model,
        text_encoder=listen,
        world=WORLDS[world],
        new_decoder=lambda: Shown(scene(asked.pop(pick)), change, WORLDS[world]),
    )


def drawn(seed: int) -> Callable[[str], Scene]:
    """Scenes of the varied world, drawn one after another."""
    source, world = generator(seed), ToyWorld(WORLDS["varied"])
    return lambda prompt: world.sample_scenes(1, source, pool=[parse(prompt)])[0]


# Videos of which the truth is known


def test_evaluation_of_the_truth(model):
    """A decoder that shows the prompts must get full marks; one that shows them in another's place must not."""
    seen = []
    options = {"num_frames": [6, 24], "order": ["stream"], "batch": 3}
    rows = evaluate_toy(showing(model), PROMPTS, **options, on_videos=lambda *n: seen.append(n))
    assert seen == [(3, 8), (6, 8), (8, 8)]  # the shorter videos are the beginnings of the longer ones
    assert [(row.order, row.num_frames, row.videos, len(row.parts)) for row in rows] == [
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
        showing(model, "varied", change=decline), prompts, num_frames=[24], order=["block_first"], parts=8
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
    options = {"num_frames": [BLOCK], "order": ["stream"], "parts": 1, "seeds": 12}
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

    options = {"num_frames": [BLOCK], "order": ["stream"], "parts": 1, "seeds": 3}
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
    told = Diversity.of(world, [readings(one, other), readings(far, far)])
    assert told.background == pytest.approx(
        math.sqrt((0.1**2 / 2 / 2) / ((0.32**2 + 0.22**2 + 0.32**2) / 12)), rel=0.02
    )
    assert told.start == pytest.approx(math.sqrt((0.4**2 / 2 / 2) / (2 * 0.5**2 / 3)), rel=0.1)
    assert told.texture == pytest.approx(0, abs=0.03)
    nothing = dataclasses.replace(readings(one)[0], background=torch.full((3, 3), math.nan))
    told = Diversity.of(world, [[nothing, *readings(one, other)]])
    assert told.background == pytest.approx(math.sqrt((0.1**2 / 2) / ((0.32**2 + 0.22**2 + 0.32**2) / 12)), rel=0.02)
    with pytest.raises(ValueError, match="two seeds"):
        Diversity.of(world, [readings(one)])


# What is made


@pytest.mark.parametrize("order", ["stream", "block_first", "step_first"])
def test_a_shorter_video_is_the_beginning_of_the_longer_one(model, order):
    """So that one rollout serves all lengths; exactly, once both fill the window."""
    options = {
        "text": model.encode_text(small_toy.PROMPT), "schedule": model.schedule, "height": 8, "width": 8, "seed": 5,
        "order": order, "frames_per_block": BLOCK, "window_frames": WINDOW,
    }  # fmt: skip
    short, long = (rollout(model.transformer, None, num_frames=n, **options) for n in (12, 27))
    assert torch.equal(short, long[:, :12])


def test_lengths_of_one_rollout_are_those_of_single_ones(model):
    options = {"order": ["block_first"], "parts": 2}
    both = evaluate_toy(model, PROMPTS[:3], num_frames=[12, 27], **options)
    single = [evaluate_toy(model, PROMPTS[:3], num_frames=[n], **options)[0] for n in (12, 27)]
    assert [row.to_dict() for row in both] == [row.to_dict() for row in single]


def test_evaluation_does_not_depend_on_the_batch(model):
    rows = [evaluate_toy(model, PROMPTS[:3], num_frames=[6], order=["step_first"], batch=n)[0] for n in (1, 3)]
    a, b = (dataclasses.asdict(row.whole) for row in rows)
    assert a == pytest.approx(b, rel=1e-3, nan_ok=True)


def latents_asked(model: VideoModel, asked: list[Tensor]) -> VideoModel:
    class Listen:
        def decode(self, latents: Tensor):
            asked.append(latents)
            return model.decoder().decode(latents)

    return dataclasses.replace(model, new_decoder=Listen)


def test_the_form_is_the_models_or_the_one_asked_for(model):
    """Source, windows and order of the folder reach the rollout, and arguments override them."""
    config = dataclasses.replace(model.transformer.config, num_layers=2)  # keys of a first layer know no context
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = dataclasses.replace(model, transformer=HiARTransformer(config).eval().requires_grad_(False))
    own = dataclasses.replace(model, cache_source="next_step", order="stream", window_frames=(4, 9))
    asked: list[Tensor] = []
    (row,) = evaluate_toy(latents_asked(own, asked), PROMPTS[:1], num_frames=[18], seed=3)
    assert (row.order, row.cache_source, row.window_frames) == ("stream", "next_step", (4, 9))
    rows = evaluate_toy(
        latents_asked(own, asked), PROMPTS[:1], num_frames=[18], seed=3, order=["block_first"], cache_source="own",
        window_frames=6,
    )  # fmt: skip
    assert [(r.order, r.cache_source, r.window_frames) for r in rows] == [("block_first", "own", (6, 6))]
    common = {
        "text": model.encode_text(PROMPTS[0].text()), "schedule": model.schedule, "num_frames": 18, "height": 8,
        "width": 8, "seed": 3, "frames_per_block": BLOCK,
    }  # fmt: skip
    lent = {"order": "stream", "cache_source": "next_step", "window_frames": (4, 9)}
    forms = [lent, {"order": "block_first", "window_frames": 6}]
    for latents, form in zip(asked, forms, strict=True):
        assert torch.equal(latents, rollout(model.transformer, None, **common, **form))
    asked.clear()  # the video, and its first block of each seed
    evaluate_toy(latents_asked(own, asked), PROMPTS[:1], num_frames=[18], seed=3, seeds=2)
    for latents, frames, seed in zip(asked, (18, BLOCK, BLOCK), (3, 3, 4), strict=True):
        expected = rollout(model.transformer, None, **{**common, **lent, "num_frames": frames, "seed": seed})
        assert torch.equal(latents, expected)
    assert [row.order for row in evaluate_toy(model, PROMPTS[:1], num_frames=[6])] == ["step_first", "block_first"]


@pytest.mark.parametrize(
    ("order", "source", "windows", "count"),
    [
        ("stream", "own", (9, 9), 4), ("step_first", "own", (9, 9), 4), ("block_first", "own", (9, 9), 3),
        ("stream", "next_step", (9, 9), 3), ("stream", "own", (3, 9), 3), ("stream", "own", (None, None), 4),
    ],
)  # fmt: skip
def test_forwards_of_a_block_are_those_of_the_walk(model, order, source, windows, count):
    """Against one more block of a long walk; nobody reads the cache of a window that holds only the block itself."""
    (row,) = evaluate_toy(model, PROMPTS[:1], num_frames=[6], order=[order], cache_source=source, window_frames=windows)
    plan = Plan(2, order, BLOCK, window_frames=windows, cache_source=source)
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
        ({"num_frames": [3]}, "at least 6 frames, got 3"),
        ({"num_frames": [6], "parts": 7}, "at least 7 frames, got 6"),
        ({"num_frames": [7]}, "nearest 6 or 9"),
        ({"num_frames": []}, "at least one length"),
        ({"parts": 0}, "one part"),
        ({"seeds": 1}, "seeds must be 0 .* got 1"),
        ({"order": ["x"]}, "order"),
        ({"order": ["stream"], "cache_source": "x"}, "cache_source='x'"),
        ({"cache_source": "next_step"}, "impossible with order='step_first'"),
        ({"window_frames": (6, 6, 6)}, r"one per step \(2\)"),
        ({"window_frames": 2}, "window_frames=2"),
        ({"model": dataclasses.replace(model, world=None)}, "shows no toy world"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_toy(**{"model": model, "prompts": PROMPTS[:1], "num_frames": [6], **wrong})


def test_the_folder_says_the_form(folder, model, tmp_path):
    """Old folders lack both keys and are as before; others keep them, and refuse what cannot be."""
    config = json.loads((folder / "config.json").read_text())
    assert (config["cache_source"], config["order"]) == ("own", None)

    def load(**changes):
        values = {key: value for key, value in {**config, **changes}.items() if value != "gone"}
        (tmp_path / "config.json").write_text(json.dumps(values))
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        return load_video_model(tmp_path, "cpu")

    old = load(cache_source="gone", order="gone")
    assert (old.cache_source, old.order) == (model.cache_source, model.order) == ("own", None)
    lent = load(cache_source="next_step", order="wavefront")
    assert (lent.cache_source, lent.order) == ("next_step", "wavefront")
    for changes, message in (
        ({"order": "x"}, "order must be one of step_first, .* got 'x'"),
        ({"cache_source": "x"}, "cache_source must be one of own, next_step, got 'x'"),
        ({"cache_source": "next_step"}, "needs the order stream or wavefront, got None"),
        ({"cache_source": "next_step", "order": "block_first"}, "needs the order stream"),
        ({"caches": 1}, "unknown key caches; known: .*cache_source, order"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**changes)


# The table over variants and training seeds


def write(folder, name: str, values: Sequence[float] = (1.0,), sha: str | None = None, **changes) -> None:
    """A file of `hiar evaluate toy --json`, a row for each valid share (in the last part; the first has 1)."""
    part = {"colour": 1.0, "shape": 0.5, "valid": 1.0, "direction": 1.0, "speed_ratio": 0.8, "background_change": 0.1,
            "texture_kept": 0.5, "texture_ratio": 0.7}  # fmt: skip
    rows = [
        {
            "order": "stream", "cache_source": "own", "window_frames": [9], "num_frames": 96 * 4**i, "forwards": 8,
            "visible_frames": 9.0, "whole": {**part, "valid": value}, "parts": [part, {**part, "valid": value}],
            "drift": value - 1, "diversity": None, **changes,
        }
        for i, value in enumerate(values)
    ]  # fmt: skip
    content = {"weights_sha256": sha or name, "prompts": 64, "seed": 0, "rows": rows}
    (folder / name).write_text(json.dumps(content))


def test_table_is_mean_and_spread_over_seeds(tmp_path):
    for seed, valid in enumerate((0.5, 0.7, 0.9)):
        write(tmp_path, f"hiar-seed{seed}.json", [1.0, valid])
    write(tmp_path, "self-forcing-seed10.json", [0.4, 0.1])
    lines = table(tmp_path).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    named = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [(row["frames"], row["variant"], row["seeds"]) for row in named] == [
        ("96", "hiar", "3"), ("96", "self-forcing", "1"), ("384", "hiar", "3"), ("384", "self-forcing", "1"),
    ]  # fmt: skip
    assert named[2]["valid %"] == "70.0 ± 20.0" and named[2]["drift of valid"] == "-30.0 ± 20.0"
    assert named[3]["valid %"] == "10.0" and named[3]["background change"] == "0.100"
    assert named[0]["speed/truth"] == "0.80 ± 0.00" and named[0]["shape %"] == "50.0 ± 0.0"
    assert (named[0]["forwards"], named[0]["see"]) == ("8", "9.0")
    assert not any("diversity" in heading for heading in rows[0]), "nobody measured it"
    assert "1/2" in lines[-1]


def test_table_shows_what_some_measured(tmp_path):
    write(tmp_path, "a-seed0.json", diversity={"background": 0.5, "texture": 0.25, "start": None})
    write(tmp_path, "b-seed0.json")
    head, _, a, b, *_ = table(tmp_path).splitlines()
    assert "diversity: background" in head and "start" not in head
    assert "| 0.50 | 0.25 | 8 |" in a and "| - | - | 8 |" in b


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no VARIANT-seedN.json"),
        ({"a.json": {}}, "a.json is not named VARIANT-seedN.json"),
        ({"a-seedx.json": {}}, "is not named"),
        ({"a-seed0.json": {}, "a-seed1.json": {"num_frames": 48}}, "variant a: a-seed1.json .* in another way"),
        ({"a-seed0.json": {}, "a-seed1.json": {"cache_source": "next_step"}}, "in another way than a-seed0.json"),
        ({"a-seed0.json": {"sha": "x"}, "a-seed1.json": {"sha": "x"}}, "a-seed1.json and a-seed0.json .* same weights"),
        ({"a-seed0.json": {"parts": []}}, "a-seed0.json is no result of hiar evaluate toy"),
        ({"a-seed0.json": {"values": ()}}, "no rows"),
    ],
)  # fmt: skip
def test_table_refuses(tmp_path, files, message):
    for name, changes in files.items():
        write(tmp_path, name, **changes)
    with pytest.raises(ValueError, match=message) as error:
        table(tmp_path)
    assert "\n" not in str(error.value)


def test_table_refuses_what_is_no_evaluation(tmp_path):
    (tmp_path / "a-seed0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a-seed0.json is no result .*KeyError\('rows'\)"):
        table(tmp_path)
    with pytest.raises(ValueError, match="is no folder of evaluations"):
        table(tmp_path / "nowhere")


def test_command_line_from_model_to_table(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(folder), "--prompts", "2", "--num-frames", "[6,12]", "--order", "[stream]",
               "--cache-source", "next_step", "--parts", "3", "--seeds", "2"]  # fmt: skip
    (tmp_path / "rows").mkdir()
    for seed in (0, 1):
        assert main(["evaluate", "toy", *options, "--json", f"rows/lent-seed{seed}.json"]) == 0
        told = capsys.readouterr().out
        assert "by 1/3" in told and "| stream |     12 |" in told and "diversity of first blocks" in told
    assert main(["evaluate", "toy-table", "rows"]) == 2
    assert "same weights" in capsys.readouterr().err
    (tmp_path / "rows/lent-seed1.json").unlink()
    assert main(["evaluate", "toy-table", "rows", "--markdown", "table.md"]) == 0
    told = capsys.readouterr().out
    assert told == (tmp_path / "table.md").read_text() and "| 12 | lent | stream | 1 |" in told
    for words, message in (
        (["toy-table"], "needs the folder"),
        (["toy", "rows"], "belong to hiar evaluate toy-table"),
        (["toy", "--markdown", "x.md"], "belong to hiar evaluate toy-table"),
        (["toy-table", "rows", "--markdown", "no/x.md"], "cannot write no/x.md"),
    ):
        assert main(["evaluate", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["--num-frames", "6", "--order", "block_first"], [("block_first", "6")]),
        (["--num-frames", "[6,12]", "--order", "stream"], [("stream", "6"), ("stream", "12")]),
        (["--num-frames", "6", "--order", "[]"], [("step_first", "6"), ("block_first", "6")]),
    ],
    ids=str,
)
def test_one_length_or_order_needs_no_list(folder, capsys, words, rows):
    assert main(["evaluate", "toy", "--model", str(folder), "--prompts", "1", "--parts", "1", *words]) == 0
    shown = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [(order.strip(), frames.strip()) for order, frames in shown] == rows
