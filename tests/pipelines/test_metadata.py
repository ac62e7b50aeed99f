"""The command in the record of a video, run in its folder, makes it again: whatever the rate and wherever files lie."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import small_toy
import torch

from hiar_model import generate
from hiar_model.cli import main
from hiar_model.io.files import seen_from
from hiar_model.io.video import save_png
from hiar_model.models.wan import _as_option
from hiar_model.pipelines.prompt_schedule import PromptSchedule

pytestmark = pytest.mark.cpu

PROMPT = "a red circle moving right"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A project: its model and pictures beside each other, videos in a folder of their own."""
    project = tmp_path / "a project"
    small_toy.write_model(project / "models" / "toy")
    for folder in ("out", "in"):
        (project / folder).mkdir()
    save_png(np.full((24, 24, 3), 90, np.uint8), project / "in" / "i.png")
    (project / "in" / "s.txt").write_text(f"0 {PROMPT}\n0.5 a blue square moving up\n")
    monkeypatch.chdir(project)
    threads = torch.get_num_threads()
    yield project
    torch.set_num_threads(threads)


def read(path: Path) -> tuple[list[bytes], object]:
    with av.open(str(path)) as clip:
        return [f.to_ndarray(format="rgb24").tobytes() for f in clip.decode(video=0)], clip.streams.video[
            0
        ].average_rate


def again(video: Path, monkeypatch) -> None:
    """Run the command of a record in the folder of its video, in whose place it must make the same."""
    words = shlex.split(json.loads(Path(f"{video}.json").read_text())["command"])
    before = read(video)
    for file in (video, Path(f"{video}.json")):
        file.write_bytes(b"of another")
    monkeypatch.chdir(video.parent)
    assert words[0] == "hiar" and main(words[1:]) == 0
    assert read(video) == before


@pytest.mark.parametrize("fps", [12.0, 24000 / 1001, 23.976023976, 14.9999999, 1 / 3])
def test_the_rate(here, monkeypatch, fps):
    generate(PROMPT, model="models/toy", fps=fps).save("out/v.mp4")
    words = shlex.split(json.loads(Path("out/v.mp4.json").read_text())["command"])
    assert float(words[words.index("--fps") + 1]) == fps
    again(here / "out" / "v.mp4", monkeypatch)


@pytest.mark.parametrize(
    "options",
    [["--prompts", "in/s.txt", "--order", "stream"], [PROMPT, "--image", "in/i.png", "--num-frames", "13"]],
)
@pytest.mark.parametrize("out", ["out/v.mp4", "v.mp4"])
def test_its_files(here, monkeypatch, options, out):
    assert main(["generate", *options, "--model", "models/toy", "-o", out]) == 0
    again(here / out, monkeypatch)


def test_a_folder_that_moves(here, tmp_path, monkeypatch):
    options = ["--image", "in/i.png", "--num-frames", "13"]
    assert main(["generate", PROMPT, *options, "--model", "models/toy", "-o", "v.mp4"]) == 0
    monkeypatch.chdir(tmp_path)
    shutil.move(here, tmp_path / "elsewhere")
    again(tmp_path / "elsewhere" / "v.mp4", monkeypatch)


def test_a_folder_that_is_called_as_a_shipped_model(here, monkeypatch):
    assert main(["generate", PROMPT, "--model", "models/toy", "-o", "models/v.mp4"]) == 0
    assert "--model ./toy " in json.loads(Path("models/v.mp4.json").read_text())["command"]
    again(here / "models" / "v.mp4", monkeypatch)


def test_the_shipped_model_is_told_by_its_name(here):
    (here / "toy").mkdir()
    command = generate(PROMPT, num_frames=3, steps=1).metadata["command"]
    assert command[command.index("--model") + 1] == "toy"


def test_prompts_of_no_file_have_no_command(here):
    script = PromptSchedule.of([(0, PROMPT), (0.5, "a blue square moving up")])
    video = generate(None, model="models/toy", prompts=script, order="stream")
    video.save("out/v.mp4")
    record = json.loads(Path("out/v.mp4.json").read_text())
    assert "command" not in record and record["prompts"][1] == [0.5, "a blue square moving up"]


def test_checkpoints_are_told_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _as_option("a/w.pt") == f"{tmp_path}/a/w.pt" and _as_option(None) == ""
    both = f"0-1={tmp_path}/a.pt,2-3={tmp_path}/b.pt"
    assert _as_option("0-1=a.pt,2-3=b.pt") == _as_option({"0-1": "a.pt", "2-3": "b.pt"}) == both


def test_only_files_are_renamed(tmp_path):
    words = ["generate", f"{tmp_path}/x", "--image", f"{tmp_path}/x/i.png", "--model", f"{tmp_path}2"]
    assert seen_from(tmp_path, words) == [
        "generate",
        f"{tmp_path}/x",
        "--image",
        "./x/i.png",
        "--model",
        f"{tmp_path}2",
    ]
