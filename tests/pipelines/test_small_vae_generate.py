"""A Wan folder without a VAE, and the small one in its place, from prompt or picture to file and record."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import wan_files
from made_runs import prepare
from refusals import refusal
from taehv_weights import taehv_state

from hiar_model import generate, load_video_model
from hiar_model.cli import main
from hiar_model.io.video import save_png
from hiar_model.models.small_stream import SmallDecoder, SmallEncoder
from hiar_model.models.vae import to_pixels

pytestmark = pytest.mark.cpu

SIZE = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = wan_files.write_original(tmp_path_factory.mktemp("wan") / "wan")
    torch.save(taehv_state(), folder / "taew2_1.pth")  # beside the transformer's weights
    (folder / wan_files.VAE).rename(folder.parent / wan_files.VAE)
    return folder


def command(*words) -> int:
    size = ["--height", 32, "--width", 48, "--num-frames", 9, "--steps", 2, "--device", "cpu"]
    return main([str(word) for word in ["generate", wan_files.PROMPT, *size, *words]])


def test_the_command_its_record_and_the_same_again(folder, here, capsys):
    assert command("-o", "a/", "--model", folder, "--vae", folder / "taew2_1.pth") == 0
    told = capsys.readouterr().out
    assert re.search(r"[\d.]+ fps with the small VAE; [\d.]+ fps without decoding\)\n$", told), told
    record = json.loads((here / "a/video.json").read_text())
    sha256 = hashlib.sha256((folder / "taew2_1.pth").read_bytes()).hexdigest()
    assert record["decoded_by"] == {"vae": "small", "file": "taew2_1.pth", "sha256": sha256}
    words = shlex.split(record["command"])
    assert main([*words[1:-1], "b/"]) == 0
    for image in (here / "a").glob("*.png"):
        assert image.read_bytes() == (here / "b" / image.name).read_bytes()


def test_a_picture_is_encoded_and_decoded_by_it(folder, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # not needed
    model = load_video_model(folder, "cpu", vae=folder / "taew2_1.pth", steps=2)
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 256, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    save_png(picture, "first.png")
    options = {**SIZE, "num_frames": 13, "order": "stream", "image": "first.png"}
    run = prepare(wan_files.PROMPT, model=model, **options)
    given, made = list(run)
    small = model.decoder().vae
    expected = SmallEncoder(small).encode(to_pixels(picture[None])).to(run.prefix)
    assert np.array_equal(given[0], picture) and torch.equal(run.prefix, expected)
    again = prepare(wan_files.PROMPT, model=model, **options)
    latents = torch.cat([again.prefix, *(block.latents for block in again.rollout)], 1)
    whole = SmallDecoder(small).decode(latents)
    assert made.shape == (12, 32, 48, 3) and np.array_equal(made, whole[1:])


def test_a_session_resumes_with_the_same_kind_of_vae(folder, here):
    """Not "VAE state: features.10 is unexpected", after the model is loaded."""
    options = {**SIZE, "num_frames": 21, "order": "stream"}
    small = load_video_model(folder, "cpu", vae=folder / "taew2_1.pth", steps=1)
    run = prepare(wan_files.PROMPT, model=small, **options)
    next(iter(run))
    run.save_session("s.safetensors")
    full = load_video_model(folder, "cpu", vae=folder.parent, steps=1)
    line = refusal(prepare, wan_files.PROMPT, model=full, session="s.safetensors", **options)
    assert line == "s.safetensors is of another run: vae was 'small', now it is 'full'"


@pytest.mark.parametrize("option", ["checkpoint", "vae", "prompt_cache", "on_checkpoint", "on_stage"])
def test_a_list_in_place_of_a_file_or_function(folder, option):
    kind = "a function or None" if option.startswith("on_") else "the path of a file or folder"
    assert refusal(load_video_model, folder, "cpu", **{option: ["a"]}) == f"{option} must be {kind}, got ['a']"


def test_what_moves_to_the_cpu_is_one_word_or_several(folder):
    vae = folder / "taew2_1.pth"
    for offload in ("text", ["text"], iter(["text"])):
        assert load_video_model(folder, "cpu", vae=vae, offload=offload).options["offload"] == "text"
    line = refusal(load_video_model, folder, "cpu", vae=vae, offload="gpu")
    assert line == "offload must be one of text, vae, got 'gpu'"


@pytest.mark.parametrize(
    ("steps", "options", "word", "expected"),
    [
        (2, {}, "--steps", "2"),
        (None, {"steps": 2}, "--steps", "2"),
        (2, {"window_frames": (None, 6)}, "--window-frames", "[null, 6]"),
        (2, {"window_frames": None}, "--window-frames", "null"),
    ],
)
def test_the_record_has_the_steps_of_loading_and_open_windows(folder, here, steps, options, word, expected):
    """`[None, 6]` is no value of the option, and without the steps another video is made."""
    vae = folder / "taew2_1.pth"
    video = generate(
        wan_files.PROMPT, model=load_video_model(folder, "cpu", vae=vae, steps=steps), **SIZE, num_frames=9, **options
    )
    words = video.metadata["command"]
    assert words[words.index(word) + 1] == expected
    video.save("a/")
    assert main(["generate", "--config", "a/video.json", "-o", "b/"]) == 0
    for image in (here / "a").glob("*.png"):
        assert image.read_bytes() == (here / "b" / image.name).read_bytes()


def test_a_file_that_is_no_vae(folder, here, capsys):
    assert command("-o", "a/", "--model", folder, "--vae", folder / wan_files.TEXT_ENCODER) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds the weights of a text encoder, expected a VAE of Wan 2.1: taew2_1" in error
    assert command("-o", "a/", "--model", folder, "--vae", "gone.pth") == 2
    assert "--vae gone.pth: no such file" in capsys.readouterr().err
    assert not (here / "a").exists()
    assert refusal(lambda: load_video_model("toy", "cpu", vae="taew2_1.pth")) == (
        "model toy is no Wan folder: it takes no vae, got 'taew2_1.pth'"
    )


def test_the_doctor_counts_it(folder, capsys):
    words = ["doctor", "--model", str(folder), "--height", "32", "--width", "48", "--frames", "9"]
    assert main(words) == 0
    assert "Not counted because missing: VAE." in capsys.readouterr().out
    assert main([*words, "--vae", str(folder / "taew2_1.pth")]) == 0
    told = capsys.readouterr().out
    assert "| VAE | 0.02 | weights, float16, the small one |" in told and "missing" not in told
    assert main(["doctor", "--model", "toy", "--vae", str(folder / "taew2_1.pth")]) == 2
    assert "--vae has no effect on toy, which has no text encoder and no VAE" in capsys.readouterr().err
