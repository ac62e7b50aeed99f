"""hiar compare: each panel is that order's own video, the figures are those of the whole videos, frames are written as
they come, and what cannot be made is refused before work starts.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
from pathlib import Path

import av
import numpy as np
import pytest
import small_toy
import torch
from small_toy import PROMPT

from hiar_model import PromptSchedule, VideoPipeline, compare, generate, load_video_model
from hiar_model.cli import build_parser, main
from hiar_model.evaluation.quality import frame_statistics
from hiar_model.io import captions
from hiar_model.io.captions import CaptionedGrid
from hiar_model.io.video import VideoWriter, upscale
from hiar_model.pipelines.compare import NOT_COMPARED, PANEL_SIDE
from hiar_model.toy.oracle import ToyOracle

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("here")]

FRAMES = 24
ORDERS = ("block_first", "stream", "step_first")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_toy.write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def model(folder):
    return load_video_model(folder, "cpu")


@pytest.fixture(scope="module")
def videos(model) -> dict[str, np.ndarray]:
    pipeline = VideoPipeline(model)
    return {order: pipeline(PROMPT, num_frames=FRAMES, order=order, seed=3).frames for order in ORDERS}


def pictures(folder: Path) -> list[np.ndarray]:
    images = []
    for path in sorted(folder.glob("frame_*.png")):
        with av.open(str(path)) as picture:
            images += [frame.to_ndarray(format="rgb24") for frame in picture.decode(video=0)]
    return images


def test_every_panel_is_the_video_of_its_order(model, videos, here):
    result = compare(PROMPT, "a/", orders=ORDERS, model=model, num_frames=FRAMES, speed=5, seed=3)
    shown = pictures(here / "a")
    assert len(shown) == 5 == result.frames_shown and result.num_frames == FRAMES
    grid = CaptionedGrid("", [("", "")] * 3, (PANEL_SIDE, PANEL_SIDE))
    assert shown[0].shape == (grid.canvas.height, grid.canvas.width, 3)
    for number, image in enumerate(shown):
        for order, (top, left) in zip(ORDERS, grid.corners, strict=True):
            panel = image[top : top + PANEL_SIDE, left : left + PANEL_SIDE]
            np.testing.assert_array_equal(panel, upscale(videos[order][5 * number][None], PANEL_SIDE)[0])
    assert (videos["block_first"] != videos["stream"]).any()
    # The counter is all that changes outside of the panels; captions differ from panel to panel.
    outside = np.stack(shown)
    for top, left in grid.corners:
        outside[:, top : top + PANEL_SIDE, left : left + PANEL_SIDE] = 0
    changed = (outside != outside[0]).any((0, 2, 3)).nonzero()[0]
    assert len(changed) and changed.min() > grid.corners[0][0] + PANEL_SIDE
    above = [outside[0, : grid.corners[0][0], left : left + PANEL_SIDE] for _, left in grid.corners]
    assert (above[0] != above[1]).any() and (above[1] != above[2]).any()


def test_figures_are_those_of_the_whole_videos(model, videos, here):
    result = compare(PROMPT, "a.mp4", orders=ORDERS, model=model, num_frames=FRAMES, seed=3)
    assert [each.forwards for each in result.orders] == [3, 4, 4]  # two steps
    oracle = ToyOracle(model.world)
    for each in result.orders:
        whole = videos[each.order]
        reading = oracle.evaluate(torch.from_numpy(whole), PROMPT)
        assert each.quality["valid"] == pytest.approx([p.valid.double().mean().item() for p in reading.parts(8)])
        contrast = frame_statistics(whole)["contrast"].reshape(8, 3).mean(1)
        assert each.quality["contrast"] == pytest.approx(contrast)
    record = json.loads((here / "a.mp4.json").read_text())
    assert [each["order"] for each in record["orders"]] == [*ORDERS] and "rollout" not in record
    assert record["orders"][0]["quality"].keys() == result.orders[0].quality.keys()
    assert record["orders"][1]["rollout"]["order"] == "stream"
    assert (record["speed"], record["frames"], record["num_frames"]) == (1, FRAMES, FRAMES)
    assert {path.name for path in here.iterdir()} == {"a.mp4", "a.mp4.json", "a.drift.png"}
    with av.open(str(here / "a.drift.png")) as picture:
        assert (picture.streams.video[0].width, picture.streams.video[0].height) == (3 * 480, 2 * 300)


def test_frames_are_written_as_they_come(model, here, monkeypatch):
    """The first is written before a quarter of the work is done, and no frames wait for others."""
    done, written = [], []
    write = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: (written.append(done[-1]), write(self, frames)))
    options = {"num_frames": 48, "steps": 1, "on_progress": lambda *state: done.append(state)}
    compare(PROMPT, "a.mp4", model=model, orders=("block_first", "stream"), speed=1, **options)
    *_, total = done[-1]
    assert done[-1][0] == 48 and done[-1][2] == total
    assert written[0][2] < total / 4 and all(frames <= i + 3 for i, (frames, *_) in enumerate(written, 1))


def test_the_defaults(model, here):
    """Long enough for drift to show, the quickest order with HiAR's result, at most eight times as fast."""
    result = compare(PROMPT, "a.mp4", model=dataclasses.replace(model, train_frames=3), steps=1)
    assert result.num_frames == 32 * 3 and result.speed == 96 // 48
    assert [each.order for each in result.orders] == ["block_first", "wavefront"]


def test_the_record_repeats_the_video(folder, here, capsys):
    words = ["compare", PROMPT, "-o", "first/", "--model", folder, "--num-frames", "12", "--speed", "3", "--seed", "5"]
    words += ["--steps", "3", "--order", "[stream,block_first]", "--window-frames", "[3,4,6]", "--fps", "7.5"]
    assert main([*map(str, words)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("first: 4 of 12 frames, 0.5 s at 7.5 fps; made in ")
    assert "plot: first/drift.png" in told[1] and told[2].startswith(
        "  stream       5 forwards a block, "
    )  # at the first step a block sees itself alone
    record = json.loads((here / "first/video.json").read_text())
    program, *again = shlex.split(record["command"])
    assert program == "hiar" and main([*again[:-1], "second/"]) == 0
    assert main(["compare", "--config", "first/video.json", "-o", "third/"]) == 0
    for other in ("second", "third"):
        for image in (here / "first").glob("*.png"):
            assert image.read_bytes() == (here / other / image.name).read_bytes()
    capsys.readouterr()
    assert main(["generate", "--config", "first/video.json", "-o", "a.gif"]) == 2
    assert "for hiar compare only" in capsys.readouterr().err


def test_options_are_those_of_the_function():
    options = build_parser().parse_args(["compare", PROMPT, "-o", "x"])["compare"]
    names = {"orders": "order"}
    for name, parameter in inspect.signature(compare).parameters.items():
        if name not in ("prompt", "out", "on_progress", "execution", "overwrite"):  # the command line asks first
            assert options[names.get(name, name)] == parameter.default, name
    own = inspect.signature(generate).parameters.keys() - inspect.signature(compare).parameters.keys()
    assert own == {*NOT_COMPARED}


REFUSED = {
    "one order": (["--order", "stream"], "--order must be two or more different ones of step_first, .*, got stream"),
    "the same twice": (["--order", "[stream,stream]"], "two or more different ones of .*, got stream, stream"),
    "no such order": (["--order", "[stream,diagonal]"], "--order must be one of step_first, .*, got 'diagonal'"),
    "no speed": (["--speed", "0"], "--speed must be a whole number of at least 1, got 0"),
    "too fast": (["--speed", "13"], "--speed must be a whole number from 1 to 12, got 13"),
    "half a block": (["--num-frames", "13"], "--num-frames must fill whole blocks of 3 .*: got 13, nearest 12 or 15"),
    "no picture": (["--image", "no.png"], "--image no.png: no such file"),
    "a prompt outside": (["--seed", "x"], "--seed must be a whole number, got 'x'"),
    "no such model": (["--model", "tiy"], "--model 'tiy' is neither a folder nor a shipped model.*did you mean toy"),
    "an order it cannot have": (["--order", "[stream,block_first]", "--model", "shared"], "kv_source='next_step' is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, folder, here, capsys):
    words, expected = REFUSED[case]
    small_toy.write_model(here / "shared", small_toy.rollout(kv_source="next_step", order="stream"))
    before = {path.name for path in here.iterdir()}
    given = ["compare", PROMPT, "-o", "a.mp4", "--model", str(folder), "--num-frames", "12", *words]
    assert main(given) == 2
    told = capsys.readouterr()
    assert told.err.startswith("hiar: ") and told.err.count("\n") == 1 and re.search(expected, told.err), told.err
    assert {path.name for path in here.iterdir()} == before


@pytest.mark.parametrize("name", ["a.mp4", "a.drift.png", "a.mp4.json"])
def test_files_that_exist_are_kept(name, folder, here, capsys):
    (here / name).write_text("mine")
    words = ["compare", PROMPT, "-o", "a.mp4", "--model", str(folder), "--num-frames", "6"]
    assert main(words) == 2
    assert f"{name} exists: give another name, or --overwrite" in capsys.readouterr().err
    assert (here / name).read_text() == "mine" and len(list(here.iterdir())) == 1
    assert main([*words, "--overwrite"]) == 0 and (here / name).read_bytes() != b"mine"


@pytest.mark.parametrize("name", NOT_COMPARED)
def test_options_of_one_video_are_refused(name, model):
    with pytest.raises(ValueError, match=f"{name} is no option of compare"):
        compare(PROMPT, "a.mp4", model=model, **{name: "x"})


def test_an_error_on_the_way_leaves_nothing(model, here, monkeypatch):
    def broken(self, images, footer):
        if footer.startswith("frame 5 "):
            raise OSError(28, "No space left on device")
        return np.zeros((32, 64, 3), np.uint8)

    monkeypatch.setattr(CaptionedGrid, "compose", broken)
    with pytest.raises(OSError, match="No space left"):
        compare(PROMPT, "a.mp4", model=model, num_frames=12)
    assert not list(here.iterdir())


def test_prompts_over_time(model, here):
    """No oracle judges a video of several prompts."""
    (here / "s.txt").write_text(f"0 {PROMPT}\n0.5 a blue square moving up\n")
    result = compare(None, "a.mp4", model=model, num_frames=12, prompts=PromptSchedule.read("s.txt"))
    assert "valid" not in result.orders[0].quality
    assert "--prompts" in json.loads((here / "a.mp4.json").read_text())["command"]


def test_letters_that_no_font_has_are_said(folder, here, capsys, monkeypatch):
    captions.typeset.cache_clear()
    monkeypatch.setattr(captions, "lacking", lambda text, face: "g" * ("g" in text))
    assert main(["compare", PROMPT, "-o", "a.mp4", "--model", str(folder), "--num-frames", "6"]) == 0
    captions.typeset.cache_clear()
    line = "no font here has the letters g of the caption: they are shown as ?; install Noto Sans"
    assert capsys.readouterr().err.splitlines().count(line) == 1
