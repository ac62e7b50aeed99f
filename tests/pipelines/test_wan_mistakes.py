"""What can be wrong with a Wan folder, a checkpoint, a size, an image, a clip, a script or an option: on the command
line each is exit code 2 and one line that names it, and nothing is left behind.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_toy
import torch
import wan_files
from safetensors.torch import load_file, save_file

from hiar_model.cli import main
from hiar_model.config import WanConfig
from hiar_model.io.video import Video, save_png

pytestmark = pytest.mark.cpu

PROMPT = wan_files.PROMPT
WEIGHTS = f"{wan_files.WEIGHTS}.safetensors"
Q = "blocks.0.self_attn.q.weight"
SIZE = ["--height", "32", "--width", "48", "--num-frames", "9"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Whole folders and files, of which each test takes what it damages."""
    root = tmp_path_factory.mktemp("wan")
    wan_files.write_original(root / "original")
    wan_files.write_original(root / "sharded", shards=2)
    wan_files.write_diffusers(root / "diffusers")
    small_toy.write_model(root / "toy")
    return root


@pytest.fixture
def here(files, tmp_path, monkeypatch):
    """An empty folder with links to the whole ones; tests run in it."""
    for name in ("original", "sharded", "diffusers"):
        (tmp_path / name).mkdir()
        for part in (files / name).iterdir():
            (tmp_path / name / part.name).symlink_to(part)
    (tmp_path / "toy").symlink_to(files / "toy")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def without(name: str):
    return lambda: Path(name).unlink()


def torn(source: str, target: str):
    """The first half of a file."""

    def write() -> None:
        content = Path(source).read_bytes()
        Path(target).unlink(missing_ok=True)
        Path(target).write_bytes(content[: len(content) // 2])

    return write


def tensors(change, target: str = "w.safetensors"):
    """The transformer's tensors, changed; as a checkpoint of its own."""

    def write() -> None:
        state = load_file(f"original/{WEIGHTS}")
        change(state)
        save_file(state, target)

    return write


def pickled(change, name: str):
    """The tensors of one of the published .pth files, changed."""

    def write() -> None:
        state = torch.load(f"original/{name}", weights_only=True)
        change(state)
        Path(f"original/{name}").unlink()
        torch.save(state, f"original/{name}")

    return write


def config(**values):
    def write() -> None:
        told = json.loads(Path("original/config.json").read_text())
        Path("original/config.json").unlink()
        Path("original/config.json").write_text(json.dumps({**told, **values}))

    return write


def text(name: str, content: str):
    return lambda: Path(name).write_text(content)


def training(**networks: int):
    return lambda: wan_files.write_training(Path("w.pt"), networks)


def other_sizes(name: str, **sizes):
    def write() -> None:
        values = {**wan_files.WAN.to_dict(), **sizes}
        wan_files.write_training(Path(name), {"generator": 0}, config=WanConfig.from_dict(values))

    return write


def image(name: str = "i.png"):
    return lambda: save_png(np.full((32, 48, 3), 90, np.uint8), name)


def clip(frames: int, name: str = "c.mp4"):
    def write() -> None:
        Video(np.full((frames, 32, 48, 3), 90, np.uint8), 16).save(name, least_side=1)
        Path(f"{name}.json").unlink()

    return write


def session() -> None:
    """Of one block, under another seed."""
    arguments = ["--model", "original", *SIZE, "--order", "stream", "--session", "s.safetensors", "--seed", "3"]
    assert main(["generate", PROMPT, "-o", "made/", *arguments]) == 0
    shutil.rmtree("made")


def both(*steps):
    return lambda: [step() for step in steps]


CHECKPOINT = ["--checkpoint", "w.safetensors"]
STREAM = ["--order", "stream"]
TOY = ["--model", "toy", "--num-frames", "6"]
# name: (what happens before, options, what the line says)
WRONG = {
    # checkpoints
    "no such checkpoint": (None, ["--checkpoint", "no.pt"], r"no\.pt: no such file or folder"),
    "another suffix": (
        text("w.ckpt", "x"),
        ["--checkpoint", "w.ckpt"],
        r"w\.ckpt: expected \.safetensors, \.pth, \.pt",
    ),
    "torn safetensors": (torn(f"original/{WEIGHTS}", "w.safetensors"), CHECKPOINT, r"w\.safetensors: corrupt"),
    "torn pickle": (both(training(generator=0), torn("w.pt", "w.pt")), ["--checkpoint", "w.pt"], r"w\.pt: corrupt"),
    "a pickle of code": (
        lambda: torch.save({"a": Path("x")}, "w.pt"),
        ["--checkpoint", "w.pt"],
        r"w\.pt: corrupt.*weights_only",
    ),
    "critic only": (
        training(critic=0),
        ["--checkpoint", "w.pt"],
        r"w\.pt: holds a critic only, expected generator_ema",
    ),
    "key gone": (tensors(lambda s: s.pop(Q)), CHECKPOINT, rf"w\.safetensors: .*missing.*{Q}"),
    "key too many": (
        tensors(lambda s: s.update(stray=torch.ones(2))),
        CHECKPOINT,
        r"w\.safetensors: .*unexpected.*stray",
    ),
    "another shape": (
        tensors(lambda s: s.update({Q: s[Q][:8] * 1})),
        CHECKPOINT,
        rf"{Q} is \[8, 256\], expected \[256, 256\]",
    ),
    "integers": (tensors(lambda s: s.update({Q: s[Q].int()})), CHECKPOINT, rf"{Q} is torch\.int32, expected one of"),
    "no transformer": (
        tensors(lambda s: (s.clear(), s.update(x=torch.ones(2)))),
        CHECKPOINT,
        "no Wan transformer.*its keys: x",
    ),
    "the VAE as checkpoint": (None, ["--checkpoint", f"original/{wan_files.VAE}"], r"Wan2\.1_VAE\.pth: "),
    "the text encoder as checkpoint": (
        None,
        ["--checkpoint", f"original/{wan_files.TEXT_ENCODER}"],
        "models_t5.*pth: ",
    ),
    "image-to-video weights": (
        other_sizes("w.pt", in_channels=36),
        ["--checkpoint", "w.pt"],
        r"w\.pt: takes 36 channels",
    ),
    "another text width": (
        other_sizes("w.pt", text_dim=48),
        ["--checkpoint", "w.pt"],
        "have width 32, the transformer takes 48",
    ),
    # weights by step
    "a step without weights": (
        training(generator=0),
        ["--checkpoint", "0-1=w.pt,3=w.pt"],
        "experts: step 2 has no file",
    ),
    "a step too many": (
        training(generator=0),
        ["--checkpoint", "0-4=w.pt"],
        "step 4 .* outside the schedule, steps are 0-3",
    ),
    "no range of steps": (training(generator=0), ["--checkpoint", "a=w.pt"], "experts: 'a' is no range of steps"),
    "no file of a step": (
        training(generator=0),
        ["--checkpoint", "0-1=w.pt,2-3=no.pt"],
        r"experts: no\.pt: no such file",
    ),
    "experts of two sizes": (
        both(training(generator=0), other_sizes("v.pt", ffn_dim=64)),
        ["--checkpoint", "0-1=w.pt,2-3=v.pt"],
        r"experts: v\.pt is .*steps share their caches",
    ),
    # folders
    "a file as model": (
        None,
        ["--model", f"original/{WEIGHTS}"],
        "is a file: give a folder as model, .* as checkpoint",
    ),
    "no such folder": (
        None,
        ["--model", "nowhere"],
        "'nowhere' is neither a folder nor a shipped model; shipped: toy, scenes",
    ),
    "no weights": (without(f"original/{WEIGHTS}"), [], r"original: no weights found; expected .*safetensors"),
    "a shard gone": (
        without(f"sharded/{wan_files.WEIGHTS}-00001-of-00002.safetensors"),
        ["--model", "sharded"],
        "index.json: names the shard .*00001-of-00002",
    ),
    "no number of steps": (None, ["--steps", "0"], "steps must be a whole number of at least 1, got 0|steps"),
    "sizes that do not fit": (config(num_layers=3), [], r"original: .*missing.*blocks\.2"),
    "heads that do not fit": (config(num_heads=3), [], r"config\.json: .*(heads|dim)"),
    "no text encoder": (
        without(f"original/{wan_files.TEXT_ENCODER}"),
        [],
        "original: no text encoder; expected models_t5",
    ),
    "no tokenizer": (without("original/google"), [], "original/google/umt5-xxl: no tokenizer; expected tokenizer.json"),
    "a torn text encoder": (
        torn(f"original/{wan_files.TEXT_ENCODER}", f"original/{wan_files.TEXT_ENCODER}"),
        [],
        "models_t5.*pth: corrupt",
    ),
    "a key of the text encoder": (
        pickled(lambda s: s.pop("blocks.1.attn.q.weight"), wan_files.TEXT_ENCODER),
        [],
        r"models_t5.*blocks\.1\.attn\.q\.weight",
    ),
    "no VAE": (
        without(f"original/{wan_files.VAE}"),
        [],
        r"original: no VAE there; expected vae/.* or Wan2\.1_VAE\.pth",
    ),
    "a torn VAE": (torn(f"original/{wan_files.VAE}", f"original/{wan_files.VAE}"), [], r"Wan2\.1_VAE\.pth: corrupt"),
    "a key of the VAE": (
        pickled(lambda s: s.pop("decoder.conv1.bias"), wan_files.VAE),
        [],
        r"Wan2\.1_VAE\.pth: .*decoder\.conv_in\.bias",
    ),
    "another pipeline": (
        both(
            without("diffusers/model_index.json"), text("diffusers/model_index.json", '{"_class_name": "FluxPipeline"}')
        ),
        ["--model", "diffusers"],
        "model_index.json: describes a FluxPipeline, expected a WanPipeline",
    ),
    # sizes
    "height": (None, ["--height", "40"], "height must be a multiple of 16 pixels, got 40, nearest 32 or 48"),
    "width": (None, ["--width", "8"], "width must be a multiple of 16 pixels, got 8, nearest 16"),
    "no height": (None, ["--height", "0"], "height must be a whole number from 1 to 65536, got 0"),
    "length": (None, ["--num-frames", "80"], "got 80, nearest 69 or 81"),
    "one frame": (None, ["--num-frames", "1"], "got 1, nearest 9"),
    "window": (None, ["--window-frames", "2"], "--window-frames must be a whole number of at least 3"),
    "sink": (None, ["--sink-frames", "19"], "--window-frames must be a whole number of at least 22"),
    # images and clips
    "no such image": (None, ["--image", "no.png"], r"image no\.png: no such file"),
    "no image": (text("i.png", "x"), ["--image", "i.png"], r"image i\.png: corrupt"),
    "another kind of image": (
        text("i.txt", "x"),
        ["--image", "i.txt"],
        r"image i\.txt: cannot read '\.txt'; legal: \.png",
    ),
    "a clip as image": (clip(9), ["--image", "c.mp4"], r"image c\.mp4: cannot read '\.mp4'"),
    "length behind an image": (image(), ["--image", "i.png"], "behind 1 conditioning frame: got 9, nearest 13"),
    "image and clip": (
        both(image(), clip(9)),
        ["--image", "i.png", "--extend", "c.mp4"],
        r"--image i\.png and --extend c\.mp4 exclude each other",
    ),
    "no such clip": (None, ["--extend", "no.mp4"], r"extend no\.mp4: no such file"),
    "a torn clip": (both(clip(9), torn("c.mp4", "c.mp4")), ["--extend", "c.mp4"], r"extend c\.mp4: corrupt"),
    "a short clip": (
        clip(3),
        ["--extend", "c.mp4"],
        r"extend c\.mp4: a clip of 3 frames is too short, expected at least 5 \(1 \+ 4n\)",
    ),
    "length behind a clip": (clip(9), ["--extend", "c.mp4"], "behind 9 conditioning frames: got 9, nearest 21"),
    # scripts
    "no such script": (None, ["--prompts", "no.txt"], r"--prompts no\.txt: no such file"),
    "no time": (
        text("s.txt", f"{PROMPT}\n"),
        ["--prompts", "s.txt"],
        r"s\.txt line 1: starts with 'a', expected",
    ),
    "times that fall": (text("s.txt", "1 a\n0.5 b\n"), ["--prompts", "s.txt"], r"s\.txt line 2: times must ascend"),
    "too late": (text("s.txt", "9 a cat\n"), ["--prompts", "s.txt"], r"s\.txt line 1: 9 s is too late"),
    "two at the start": (
        text("s.txt", "0 a cat\n"),
        ["--prompts", "s.txt"],
        r"s\.txt line 1 is the prompt at 0 s: leave out",
    ),
    # options
    "dtype": (None, ["--dtype", "int8"], "--dtype must be one of float32, bfloat16, .*int8"),
    "cache dtype": (None, ["--kv-dtype", "int4"], "--kv-dtype must be .*float8_e4m3fn, got .int4."),
    "offload": (None, ["--offload", "transformer"], "--offload must be one of text, vae, got 'transformer'"),
    "on new text": (None, ["--on-prompt-change", "forget"], "--on-prompt-change .* keep, recache, got 'forget'"),
    "on nan": (None, ["--on-nan", "hide"], "--on-nan must be one of stop, retry, got 'hide'"),
    "recache with one prompt": (
        None,
        ["--on-prompt-change", "recache"],
        "--on-prompt-change has no effect with one prompt: give --prompts",
    ),
    "a session of step_first": (
        None,
        ["--session", "s.safetensors", "--order", "step_first"],
        "order must be one of .* got step_first",
    ),
    "a session nowhere": (
        None,
        [*STREAM, "--session", "no/s.safetensors"],
        r"cannot write no/s\.safetensors: no is no folder",
    ),
    "no such session": (None, [*STREAM, "--from-session", "no"], "from-session no: no such file"),
    "no session": (
        tensors(dict, "s.safetensors"),
        [*STREAM, "--from-session", "s.safetensors"],
        r"s\.safetensors is no session",
    ),
    "another seed": (
        session,
        [*STREAM, "--from-session", "s.safetensors", "--num-frames", "21"],
        "seed was 3, now it is 0",
    ),
    "a height of the toy": (None, [*TOY, "--height", "64"], "model toy makes frames of 32x32 pixels only"),
    "a checkpoint of the toy": (
        None,
        [*TOY, "--checkpoint", "w.pt"],
        "model toy is no Wan folder: it takes no --checkpoint",
    ),
    "offload of the toy": (None, [*TOY, "--offload", "vae"], "model toy is no Wan folder: it takes no --offload"),
}


def test_there_are_enough_kinds():
    assert len(WRONG) >= 25


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line(here, capsys, name):
    before, options, message = WRONG[name]
    if before is not None:
        before()
    capsys.readouterr()
    found = {p.relative_to(here) for p in here.iterdir()}
    given = SIZE
    if "toy" in options:  # a folder here, not the shipped model
        given, options = [], ["./toy" if word == "toy" else word for word in options]
        message = message.replace("model toy", r"model \./toy")
    model = [] if "--model" in options else ["--model", "original"]
    assert main(["generate", PROMPT, "-o", "out.mp4", *model, *given, "--device", "cpu", *options]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("hiar: ") and told.err.count("\n") == 1 and not told.out, told.err
    assert re.search(message, told.err), told.err
    assert {p.relative_to(here) for p in here.iterdir()} == found, "something is left"


def test_a_prompt_is_needed(here, capsys):
    assert main(["generate", "-o", "out.mp4", "--model", "original", *SIZE]) == 2
    assert "required: a prompt" in capsys.readouterr().err
