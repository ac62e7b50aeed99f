"""Numbers, files and folders that commands are given, as a new user might: one line, before any work."""

from __future__ import annotations

import re
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch
from altered import altered
from small_toy import small_folder  # noqa: F401 (fixture)

from hiar_model.__main__ import run as run_command
from hiar_model.cli import COMMANDS, machine, main
from hiar_model.cli.choices import SHARED
from hiar_model.cli.machine import ProgressLines
from hiar_model.common.checks import out_of_memory
from hiar_model.io import files

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("here")]

RECIPE, WAN = "toy/teacher_forcing", "wan2.1-t2v-1.3b"


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    """The one line that a command of wrong input says."""
    assert run(*arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("hiar: ") and told.err.count("\n") == 1 and not told.out
    return told.err.strip()


WRONG = {
    "no size": (["doctor", "--model", "toy", "--gpu-memory", "9" * 400], "--gpu-memory must be a size such as 24GB"),
    "videos at once": (["doctor", "--model", "toy", "--batch", 10**9], "--batch must be .* from 1 to 65536, got 1"),
    "a side": (["doctor", "--model", WAN, "--height", 16 * 10**7], "--height must be a whole number from 1 to 65536"),
    "a model as a word": (["doctor", "toy"], "unrecognized arguments: toy; a model is given as --model toy"),
    "layers": (["bench", "--model", "toy", "--layers", 7], "--layers must be a whole number from 1 to 6, got 7"),
    "layers of a warm-up": (["warmup", "--model", "toy", "--layers", 7], "--layers must be .* from 1 to 6, got 7"),
    "a window": (
        ["bench", "--model", "toy", "--layers", 1, "--window-frames", 10**8],
        r"toy in float32, its weights and one window .* need \d{4,}\.\d GB, [\d.]+ GB of memory are free",
    ),
    "a key with dashes": (["train", RECIPE, "--updates", 3], "keys of a recipe are written key=value, without dashes"),
    "an option for the prompt": (
        ["generate", "--prompt", "a cat", "-o", "a.mp4"],
        '--prompt is no option; the prompt stands by itself, in quotes: hiar generate "a cat" -o cat.mp4',
    ),
    "a result elsewhere": (
        ["generate", "a red circle moving right", "-o", "~/a.mp4"],
        "cannot write ~/a.mp4: only a shell replaces ~, give /",
    ),
    "a model elsewhere": (
        ["generate", "a cat", "-o", "a.mp4", "--model", "https://host/wan"],
        "--model must be the path of a file or folder, got https://host/wan: a URL",
    ),
    "options elsewhere": (["generate", "--config", "~/a.yaml"], "--config must be the path of a file, got ~/a.yaml: "),
    "weights elsewhere": (["convert", "~/a.pt", "b.pt", "--to", "pt"], "source must be .*, got ~/a.pt: only a shell"),
    "a name of a hub": (["doctor", "--model", "Owner/Wan"], "; nothing is downloaded: give the folder with its files$"),
    "no name": (["train", RECIPE, "--out", ""], "--out must be the name of a folder, got ''"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line(here, capsys, name):
    words, message = WRONG[name]
    assert re.search(message, refused(capsys, *words))
    assert not list(here.iterdir())


def test_the_memory_of_a_converted_toy(folder, capsys):
    """It knows the positions of one frame: "latents must have (4, 4) tokens a frame, got (30, 52)"."""
    assert run("convert", folder, "m", "--to", "native") == 0
    assert run("convert", "toy", "t.safetensors", "--to", "native") == 0
    capsys.readouterr()
    assert run("doctor", "--model", "t.safetensors") == 0
    told = capsys.readouterr().out
    assert "latents 21 x 8x8" in told and "Not counted because missing: text encoder, VAE." in told
    assert run("doctor", "--model", "m") == 0
    capsys.readouterr()
    line = refused(capsys, "doctor", "--model", "t.safetensors", "--height", 64)
    assert line == "hiar: --height must be left out: native layout makes frames of one size only, got 64"


# Outputs over inputs


def test_outputs_that_would_replace_a_model(folder, here, capsys):
    """`evaluate --json small/config.json` left a model that no command could read."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = ["--model", folder]
    for words in (
        ["evaluate", "toy", *model, "--json", folder / "config.json"],
        ["generate", "a red circle moving right", *model, "-o", "a.mp4", "--session", folder / "model.safetensors"],
    ):
        line = refused(capsys, *words)
        assert re.search(rf"{words[-2]} would replace .*{words[-1].name}, which --model reads", line)
    assert "--plot and --json are one file, a.png" in refused(
        capsys, "evaluate", "toy", *model, "--json", "a.png", "--plot", "a.png"
    )
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before and not list(here.iterdir())


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_an_earlier_result_is_replaced_only_on_request(here, capsys, option):
    (here / "old.png").write_text("result")
    line = refused(capsys, "bench", "--model", "toy", option, "old.png")
    assert line == f"hiar: {option} old.png exists: give another name, or --overwrite"
    assert (here / "old.png").read_text() == "result"


BROKEN = {
    "a file": (".", "cannot write into run: it is no folder"),
    "on the way": ("run", "cannot write into run/run: .*run is no folder"),
    "states": ("run/states", "cannot write into run/states: it is no folder"),
    "the model": ("run/model", "cannot write into run/model: it is no folder"),
    "sheets": ("run/samples", "cannot write into run/samples: it is no folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_folder_of_a_run_is_tried_before_anything_is_read(here, capsys, monkeypatch, name):
    """A file by the name of the model was noticed when the model was to be written."""
    place, message = BROKEN[name]
    file = here / ("run" if place in (".", "run") else place)
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    monkeypatch.setattr("hiar_model.train.stages.base.make_stage", None)
    out = "run/run" if place == "run" else "run"
    assert re.search(message, refused(capsys, "train", RECIPE, "--out", out))
    assert file.read_text() == "mine"
    if name in ("a file", "on the way"):
        assert "no folder" in refused(capsys, "train", "toy/ode_pairs", "teacher=toy", "--out", out)


@pytest.mark.parametrize("name", ["loss.csv", "loss.png"])
def test_a_folder_in_place_of_a_file_of_a_run(here, capsys, name):
    (here / "run" / name).mkdir(parents=True)
    assert f"cannot write run/{name}: it is a folder" in refused(capsys, "train", RECIPE, "--out", "run")


def test_a_folder_that_is_not_writable(here, capsys, monkeypatch):
    def refuse(**_: object) -> None:  # root may write everywhere, so no mode bits
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "tempfile", altered(tempfile, TemporaryFile=refuse))
    assert "cannot write into runs/toy/teacher_forcing: Permission denied" in refused(capsys, "train", RECIPE)


# Processes


REQUIRED = {
    "compare": ["a red circle moving right", "-o", "a.mp4"], "evaluate": ["toy"],
    "convert": ["toy", "a", "--to", "native"],
}  # fmt: skip


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {*SHARED, "doctor"}))
def test_what_one_process_does_is_not_done_by_several(here, capsys, monkeypatch, command):
    """Each process of torchrun wrote the same file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(capsys, command, *REQUIRED.get(command, []))
    assert f"hiar: {command} is for one process, torchrun started 2 (WORLD_SIZE)" in line
    assert "generate, train, verify-parity" in line and not list(here.iterdir())


# Progress


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_progress_is_shown_without_a_terminal(folder, capsys, monkeypatch, command):
    """In a log or a job: not a word for minutes."""
    monkeypatch.setattr(ProgressLines, "EVERY", 0.0)
    tiny = ["updates=2", "batch_size=1", "num_latent_frames=6", "scale.threads=1", "sample_every=0"]
    words, line = {
        "train": ([RECIPE, *tiny, "--out", "run"], r"1/2, .*loss \d"),
        "generate": (["a red circle moving right", "-o", "a.gif", "--num-frames", 6, "--model", folder], "frames 3/6"),
        "evaluate": (["toy", "--model", folder, "--prompts", 1, "--num-frames", "[6]"], "videos 1/2"),
    }[command]
    assert run(command, *words) == 0
    assert re.search(line, capsys.readouterr().err)


def test_without_a_terminal_progress_is_lines(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 29.0, 31.0, 32.0, 61.0, 62.0])
    monkeypatch.setattr(machine, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with machine.progress_bar("updates {task.completed}/{task.total}", "{task.fields[summary]}") as bar:
        task = bar.add_task("", total=800, completed=0, summary="")
        for update in (1, 2, 3, 4, 5, 6):
            bar.update(task, completed=update, summary=f"loss {update}")
    assert capsys.readouterr().err == "updates 3/800, loss 3, 3.3 h left\nupdates 5/800, loss 5, 3.3 h left\n"


# Memory


@pytest.mark.parametrize("error, size", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                  "to allocate 32768000000 bytes. Error code 12 (Cannot allocate memory)"), ": 32768000000 bytes"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."), ": 2.50 GiB"),
    (MemoryError("Unable to allocate 7.45 TiB for an array"), ": 7.45 TiB"), (MemoryError(), ""),
])  # fmt: skip
def test_no_memory_is_one_line(capsys, monkeypatch, error, size):
    def work(_: object) -> None:
        raise error

    arguments, _, summary = COMMANDS["bench"]
    monkeypatch.setitem(COMMANDS, "bench", (arguments, work, summary))
    line = refused(capsys, "bench")
    at_once = f"{size} at once" if size else ""
    assert line == f"hiar: out of memory{at_once}; a smaller size, window, batch or number of frames needs less"


def test_other_errors_are_no_lack_of_memory(monkeypatch):
    assert out_of_memory(RuntimeError("CUDA error: an illegal memory access")) is None

    def work(_: object) -> None:
        raise RuntimeError("a fault of ours")

    arguments, _, summary = COMMANDS["bench"]
    monkeypatch.setitem(COMMANDS, "bench", (arguments, work, summary))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run("bench")


def test_ctrl_c_while_the_command_is_imported_is_one_line(capsys, monkeypatch):
    """For the first third of a second it was a traceback."""

    class Imported:
        @property
        def main(self):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "hiar_model.cli", Imported())
    assert run_command() == 130
    assert capsys.readouterr().err == "hiar: interrupted\n"
