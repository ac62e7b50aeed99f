"""Images over time and last frames: where they stand, what the record says of them, and what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from small_toy import BLOCK, FRAMES, PROMPT, TRAIN_FRAMES, small_folder, small_model  # noqa: F401

import hiar_model
from hiar_model import ExecutionConfig, VideoPipeline
from hiar_model.cli import main
from hiar_model.common.image_file import ImageFile, image_files
from hiar_model.io.video import save_png
from hiar_model.toy.oracle import ToyOracle

pytestmark = pytest.mark.cpu


@pytest.fixture
def pipeline(model, tmp_path, monkeypatch):
    """A pipeline, in a folder of its own with the pictures red.png, green.png and blue.png."""
    monkeypatch.chdir(tmp_path)
    for channel, name in enumerate(("red", "green", "blue")):
        picture = np.full((32, 32, 3), 40, np.uint8)
        picture[8:24, 8:24, channel] = 220
        save_png(picture, Path(f"{name}.png"))
    return VideoPipeline(model)


def shown(model, name: str) -> np.ndarray:
    """A picture as the codec has it."""
    from hiar_model.pipelines.conditioning import read_picture
    from hiar_model.pipelines.starts import _still

    return model.decoder().decode(_still(model, read_picture("image", name, (32, 32)))[:, None])[0]


def test_a_storyboard_stands_where_it_is_put_in_every_order(pipeline, model):
    images = ["red.png", "green.png@4", ("blue.png", 10)]
    options = {"image": images, "num_frames": 1 + 4 * BLOCK}
    videos = {order: pipeline(PROMPT, order=order, **options).frames for order in ("step_first", "stream", "wavefront")}
    video = videos["stream"]
    assert all(abs(other.astype(int) - video).max() <= 1 for other in videos.values())
    assert (video[0] == hiar_model.pipelines.conditioning.read_picture("image", "red.png", (32, 32)).frames[0]).all()
    for frame, name in ((4, "green.png"), (10, "blue.png")):
        assert (video[frame] == shown(model, name)).all()
    plain = pipeline(PROMPT, image="red.png", num_frames=1 + 4 * BLOCK, order="stream").frames
    assert (plain[:4] == video[:4]).all() and (plain[5] != video[5]).any()
    blocks = list(pipeline.stream(PROMPT, **options))
    assert [len(block) for block in blocks] == [1] + [BLOCK] * 4 and (np.concatenate(blocks) == video).all()


@pytest.mark.parametrize("num_frames", [TRAIN_FRAMES, FRAMES])
def test_a_last_frame(pipeline, model, num_frames):
    video = pipeline(PROMPT, last_frame="blue.png", num_frames=num_frames)
    assert len(video.frames) == num_frames and (video.frames[-1] == shown(model, "blue.png")).all()
    other = pipeline(PROMPT, last_frame="red.png", num_frames=num_frames).frames
    infilled = num_frames - (TRAIN_FRAMES - BLOCK)
    assert (other[:infilled] == video.frames[:infilled]).all()  # made by the rollout, which does not see it
    assert all((a != b).any() for a, b in zip(other[infilled:], video.frames[infilled:], strict=True))


def test_infilled_blocks_have_the_layers_of_the_others(pipeline, model):
    """8-bit layers: a video that is all infilled had none."""
    eight = VideoPipeline(model, ExecutionConfig(linear_dtype="float8_e4m3fn"))
    plain, found = (one(PROMPT, last_frame="blue.png", num_frames=BLOCK).frames for one in (pipeline, eight))
    assert 0 < np.abs(plain.astype(int) - found).mean() < 20


def test_a_first_and_a_last_frame_and_one_between(pipeline, model):
    """Without a number of frames, as many as in training, behind the first; one block is also made by infilling."""
    run = pipeline.prepare(
        hiar_model.pipelines.video_pipeline.VideoOptions(
            PROMPT, image=["red.png", "green.png@4"], last_frame="blue.png"
        )
    )
    assert run.num_frames == 1 + TRAIN_FRAMES
    assert run.notes() == ["frames 4 to 6 are made at once, by infilling before the last frame"]
    video = np.concatenate(list(run))
    assert (video[4] == shown(model, "green.png")).all() and (video[-1] == shown(model, "blue.png")).all()
    alone = pipeline(PROMPT, last_frame="blue.png", num_frames=BLOCK).frames
    assert len(alone) == BLOCK and (alone[-1] == video[-1]).all()
    assert [len(block) for block in pipeline.stream(PROMPT, last_frame="blue.png")] == [BLOCK] * (TRAIN_FRAMES // BLOCK)


def test_the_record_repeats_it(pipeline, folder):
    """By its command, by --config, and with another image in place of its own."""
    options = ["--image", "red.png", "--image", "green.png@4", "--last-frame", "blue.png", "--model", str(folder)]
    assert main(["generate", PROMPT, "-o", "a/", *options]) == 0
    record = json.loads(Path("a/video.json").read_text())
    assert record["given"] == ["red.png", "green.png@4", "blue.png"]
    words = shlex.split(record["command"])
    assert words.count("--image") == 2 and "--last-frame" in words
    frames = {}
    assert main(["generate", "--config", "a/video.json", "-o", "c/"]) == 0
    assert main(["generate", "--config", "a/video.json", "-o", "d/", "--image", "blue.png"]) == 0
    for name in "acd":
        frames[name] = [file.read_bytes() for file in sorted(Path(name).glob("*.png"))]
    assert frames["a"] == frames["c"] != frames["d"]
    assert json.loads(Path("d/video.json").read_text())["given"] == ["blue.png", "./blue.png"]


def test_a_session_goes_on_with_the_same_images_only(pipeline, folder, capsys):
    words = ["generate", PROMPT, "--model", str(folder), "--order", "stream", "--num-frames", "6"]
    assert main([*words, "-o", "a/", "--image", "red.png@3", "--session", "s"]) == 0
    again = [*words[:-2], "--num-frames", "12", "-o", "b/", "--from-session", "s"]
    assert main([*again, "--image", "blue.png@3"]) == 2
    line = "hiar: s is of another run: it starts from {}: {}\n"
    assert capsys.readouterr().err == line.format("other pictures", "give the same")
    assert main([*again]) == 2
    assert capsys.readouterr().err == line.format("pictures or a clip", "give the same")
    assert main([*again, "--image", "red.png@3"]) == 0
    assert main([*words, "-o", "c/", "--session", "plain"]) == 0
    capsys.readouterr()
    assert main([*again[:-1], "plain", "-o", "d/", "--image", "red.png"]) == 2, "7 frames would fit"
    assert capsys.readouterr().err == line.replace("hiar: s", "hiar: plain").format("no picture", "leave these out")
    assert main([*again[:-1], "red.png", "-o", "d/", "--image", "red.png"]) == 2
    assert "hiar: cannot read red.png: " in capsys.readouterr().err


REFUSED = {
    "no boundary": (
        {"image": "red.png@4"},
        r"image red\.png@4: no block of the video begins at frame 4, nearest 3 or 6",
    ),
    "behind an image": (
        {"image": ["red.png", "blue.png@3"], "num_frames": 13},
        r"image blue\.png@3: no block of the video begins at frame 3, nearest 1 or 4",
    ),
    "behind the end": ({"image": "red.png@12"}, r"image red\.png@12: .* frame 12, nearest 9$"),
    "twice": ({"image": ["red.png@3", ("blue.png", 3)]}, r"image red\.png and blue\.png both stand at frame 3"),
    "no frame": ({"image": "red.png@x"}, r"image red\.png@x: the frame must be a whole number from 0, got 'x'"),
    "below 0": ({"image": ("red.png", -3)}, "image frame must be a whole number of at least 0, got -3"),
    "a dict": (
        {"image": {"red.png": 3}},
        r"image must be a file, \(file, number\), or a list of these, got",
    ),
    "no file": ({"image": "no.png@3"}, r"image no\.png: no such file"),
    "no last": ({"last_frame": "no.png"}, r"last_frame no\.png: no such file"),
    "no suffix": ({"last_frame": "a"}, r"last_frame a: cannot read a name without a suffix; legal: \.png"),
    "a clip": ({"last_frame": "a.mp4"}, r"last_frame a\.mp4: cannot read '\.mp4'; legal: \.png"),
    "a session": ({"last_frame": "red.png", "session": "s"}, "last_frame and session exclude each other"),
    "a pipeline": ({"last_frame": "red.png", "run_folder": "r"}, "last_frame and run_folder exclude each other"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_stand_is_refused_in_one_line(pipeline, case):
    options, message = REFUSED[case]
    with refused(message):
        pipeline(PROMPT, **{"num_frames": FRAMES, **options})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "no.png@3"], "--image no.png: no such file; expected FILE or FILE@FRAME"),
        (["--image", "@3"], "--image @3: no file before the '@'"),
        (["--image", "red.png@4"], "--image red.png@4: no block of the video begins at frame 4, nearest 3 or 6"),
        (["--last-frame", "no.png"], "--last-frame no.png: no such file"),
        (["--last-frame", "red.png", "--session", "s"], "--last-frame and --session exclude each other: give one"),
        (["--last-frame", "red.png", "--parallel", "pipeline"], "--last-frame is for one process without a pipeline"),
        (["--last-frame", "a/0001.png", "-o", "a/0001.png"], "--last-frame"),
    ],
)
def test_on_the_command_line_too(pipeline, folder, words, message, capsys):
    assert main(["generate", PROMPT, "--model", str(folder), "-o", "v/", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("v").exists()


def test_names_of_files_and_frames(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a@3").write_text("")
    assert ImageFile.of("a@3") == ImageFile("a@3", 0)  # there is such a file
    assert ImageFile.of(str(ImageFile("a@3", 0))) == ImageFile("a@3", 0)
    assert image_files(["b.png@6", "c.png"]) == (ImageFile("c.png"), ImageFile("b.png", 6))
    assert image_files(("b.png", np.int64(6))) == (ImageFile("b.png", 6),)
    assert image_files(None) == () and image_files(("b.png", 6)) == image_files(Path("b.png@6"))


@pytest.mark.parametrize("name", hiar_model.config.SHIPPED)
def test_shipped_models_take_an_image_up(name, tmp_path):
    """They go on from where its shape is, at the start and over time; without it the shape is elsewhere."""
    model = hiar_model.load_video_model(name, "cpu")
    pipeline, oracle, prompt = VideoPipeline(model), ToyOracle(model.world), "a large blue square moving up"
    source = np.roll(pipeline(prompt, seed=9, num_frames=12).frames[8], 12, 1)  # where its shape would not be
    save_png(source, tmp_path / "i.png")
    place = oracle.evaluate(torch.from_numpy(source[None]), prompt).centres[0]

    def apart(frames: np.ndarray) -> float:
        """Pixels between the shape of the image and that of the frames after it, less the way that it goes."""
        seen = oracle.evaluate(torch.from_numpy(frames), prompt)
        way = seen.centres - place - seen.velocity_expected * torch.arange(1, 1 + len(frames))[:, None]
        return float(((way + seen.extent / 2) % seen.extent - seen.extent / 2).norm(dim=1).max())

    at_start = pipeline(prompt, image=tmp_path / "i.png", num_frames=7, seed=1).frames
    assert apart(at_start[1:6]) < 3
    over_time = pipeline(prompt, image=f"{tmp_path}/i.png@9", num_frames=18, seed=1).frames
    assert apart(over_time[10:15]) < 3
    assert apart(pipeline(prompt, num_frames=18, seed=1).frames[10:15]) > 5
