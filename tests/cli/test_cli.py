"""The command line: what it writes, what it says, and that a failure is one line, a code and nothing else."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_toy import BLOCK, FRAMES, PROMPT, small_folder  # noqa: F401 (fixtures)
from toy_codec import codec_once  # noqa: F401 (fixture)

from hiar_model import generate
from hiar_model.cli import COMMANDS, build_parser, main, train
from hiar_model.cli.choices import as_typed, check_choices
from hiar_model.config import ExecutionConfig
from hiar_model.models import registry
from hiar_model.models.registry import ToyDecoder, load_video_model
from hiar_model.train.engine.trainer import Trainer, run_folder_held

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("here")]

TOY = "toy/teacher_forcing"


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def refused(capsys, code: int, *arguments) -> str:
    """The one line that a failing command says."""
    assert run(*arguments) == code
    told = capsys.readouterr()
    assert told.err.startswith("hiar: ") and told.err.count("\n") == 1 and not told.out
    return told.err.strip()


# hiar generate


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a/"])
def test_generate(folder, here, capsys, name):
    assert run("generate", PROMPT, "-o", name, "--model", folder) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{name.strip('/')}: {FRAMES} frames, 1.0 s at 12 fps; made in ") and not told.err
    expected = {"a"} if name == "a/" else {name, f"{name}.json"}
    assert {p.name for p in here.iterdir()} == expected
    if name == "a/":
        assert len(list((here / "a").glob("frame_*.png"))) == FRAMES


def test_the_record_repeats_the_video(folder, here):
    options = ["--num-frames", 9, "--seed", 5, "--steps", 3, "--order", "stream", "--window-frames", "[3,4,6]",
               "--sink-frames", 0, "--fps", 7.5, "--dtype", "float64"]  # fmt: skip
    assert run("generate", PROMPT, "-o", "first/", "--model", folder, *options) == 0
    record = json.loads((here / "first/video.json").read_text())
    program, *words = shlex.split(record["command"])
    assert program == "hiar" and words[-2:] == ["--out", "first/"]
    assert run(*words[:-1], "second/") == 0
    again = json.loads((here / "second/video.json").read_text())
    assert {**again, "file": "first", "command": record["command"]} == record
    assert (record["fps"], record["rollout"]["window_frames"], record["frames"]) == (7.5, [3, 4, 6], 9)
    for image in (here / "first").glob("*.png"):
        assert image.read_bytes() == (here / "second" / image.name).read_bytes()


def test_a_window_of_all_frames(folder, here):
    assert run("generate", PROMPT, "-o", "a.mp4", "--model", folder, "--window-frames", "null") == 0
    record = json.loads((here / "a.mp4.json").read_text())
    assert record["rollout"]["window_frames"] is None and "--window-frames null" in record["command"]


def test_a_config_file(folder, here):
    (here / "c.yaml").write_text(f"out: a.mp4\nmodel: {folder}\nnum_frames: 6\nseed: 4\n")
    assert run("generate", PROMPT, "--config", "c.yaml", "--seed", 5) == 0
    record = json.loads((here / "a.mp4.json").read_text())
    assert (record["num_frames"], record["seed"]) == (6, 5)


def test_the_commands_of_make_demo():
    text = (Path(__file__).parents[2] / "Makefile").read_text()
    values = dict(re.findall(r"^(\w+) := (.*)$", text, re.MULTILINE))
    recipe = text[text.index("\ndemo:") : text.index("@echo", text.index("\ndemo:"))]
    commands = [shlex.split(re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], line)) for line in
                re.findall(r"^\t(\$\(BIN\)/hiar .*)$", recipe, re.MULTILINE)]  # fmt: skip
    written = []
    for program, *words in commands:
        command = build_parser().parse_args(words)
        check_choices(command.subcommand, command[command.subcommand])
        assert program == ".venv/bin/hiar" and command[command.subcommand].overwrite
        written.append((command.subcommand, command[command.subcommand].out))
    assert written == [("generate", "out/demo.mp4"), ("compare", "out/compare.mp4")]
    assert command["compare"].num_frames == 384 and command["compare"].speed == 8


def test_options_are_those_of_the_function():
    """Names and defaults are written twice, so that the parser need not import torch: hold them together."""
    options = build_parser().parse_args(["generate", PROMPT, "-o", "x"])["generate"]
    for name, parameter in inspect.signature(generate).parameters.items():
        if name not in ("prompt", "on_progress", "execution", "open_end", "run_folder"):
            assert options[name] == parameter.default, name
    execution = ExecutionConfig()
    assert (options["on_nan"], options["kv_dtype"]) == (execution.on_nan, execution.kv_dtype)


WRONG = {
    "no such command": (["degenerate"], "invalid choice: 'degenerate'.*did you mean generate"),
    "no prompt": (["generate", "-o", "a.mp4"], "required.*prompt"),
    "no output": (["generate", PROMPT], r"required: -o/--out \(name\.mp4"),
    "unknown option": (["generate", PROMPT, "-o", "a.mp4", "--speed", "3"], "unrecognized arguments: --speed"),
    "misspelt option": (["generate", PROMPT, "-o", "a.mp4", "--ordr", "stream"], "did you mean --order?"),
    "another command's option": (["doctor", "--checkpoint", "x"], "unrecognized arguments: --checkpoint x$"),
    "no quotes": (["generate", *PROMPT.split(), "-o", "a.mp4"], 'put the prompt in quotes: hiar generate "a red'),
    "an endless rate": (["generate", PROMPT, "-o", "a.mp4", "--fps", "1e6"], "--fps must be a number from 0.01 to"),
    "steps": (["generate", PROMPT, "-o", "a.mp4", "--steps", "2000000"], "--steps must be .* from 1 to 1000, got 2"),
    "processes": (["generate", PROMPT, "-o", "a.mp4", "--nproc", "99999"], r"--nproc must be .* from 1 to \d+, got"),
    "frames": (["generate", PROMPT, "-o", "a.mp4", "--num-frames", "9" * 30], r"from 1 to 1000000000, got 9+$"),
    "a window": (["generate", PROMPT, "-o", "a.mp4", "--window-frames", "9" * 30], "--window-frames must .* to 10{9}"),
    "standard output": (["generate", PROMPT, "-o", "-"], "'-' is not a file name for a video"),
    "an empty name": (["generate", PROMPT, "-o", ".mp4"], "'.mp4' is not a file name for a video"),
    "no lengths": (["evaluate", "toy", "--num-frames", "[]"], r"--num-frames must hold something, got \[\]"),
    "a rate of training": (["train", TOY, "optimizer.lr=inf"], "optimizer.lr must be a number, got 'inf'"),
    "a switch": (["generate", PROMPT, "-o", "a.mp4", "--cuda-graph"], "expected one argument of true, false: capture"),
    "no value": (["generate", PROMPT, "-o"], "argument -o/--out: expected one argument: name.mp4, "),
    "no number": (["generate", PROMPT, "-o", "a.mp4", "--num-frames", "many"], "--num-frames must be.*many"),
    "no window": (["generate", PROMPT, "-o", "a.mp4", "--window-frames", "wide"], "--window-frames .*wide.: latent"),
    "unknown output": (["generate", PROMPT, "-o", "a.avi"], r"unknown suffix '\.avi'; legal: name\.mp4"),
    "no such folder": (["generate", PROMPT, "-o", "no/a.mp4"], "no is no folder; make it first"),
    "empty prompt": (["generate", "", "-o", "a.mp4"], "the prompt is empty"),
    "unknown word": (["generate", "a red cube moving up", "-o", "a.mp4"], "'cube' is no legal shape .* circle, square"),
    "length": (["generate", PROMPT, "-o", "a.mp4", "--num-frames", "13"], "got 13, nearest 12 or 15"),
    "zero": (["generate", PROMPT, "-o", "a.mp4", "--num-frames", "0"], "at least 1, got 0"),
    "threads": (["generate", PROMPT, "-o", "a.mp4", "--threads", "0"], r"--threads must be .* from 1 to \d+, got 0"),
    "gif pace": (["generate", PROMPT, "-o", "a.gif", "--fps", "90"], "at most 50 fps"),
    "device": (["generate", PROMPT, "-o", "a.mp4", "--device", "cuda:77"], "'cuda:77' is not there"),
    "no config": (["generate", PROMPT, "-o", "a.mp4", "--config", "nowhere.yaml"], "nowhere.yaml"),
    "no such recipe": (["train", "toy"], "no recipe 'toy': neither a file nor one of scenes/.*, toy/hiar, "),
    "no recipe": (["train"], r"required: RECIPE"),
    "order": (["generate", PROMPT, "-o", "a.mp4", "--order", "straem"], "straem.; did you mean stream"),
    "recipe key": (["train", TOY, "update=3"], "unknown key update; did you mean updates"),
    "recipe value": (["train", TOY, "updates=few"], "updates must be a whole number, got 'few'"),
    "no override": (["train", TOY, "updates"], "'updates' is not an override: write key=value"),
    "training device": (["train", TOY, "--device", "gpu"], "'gpu'"),
    "world": (["train", TOY, "data.world=flat"], "data.world must be one of plain, .*, got 'flat'"),
    "no teacher": (["train", "toy/ode_pairs", "teacher=no.safetensors"], "no.safetensors: no such file or folder"),
    "no trajectories": (["train", "toy/ode_init", "init=toy", "trajectories=no"], "no: no trajectories; expected"),
    "no such world": (["evaluate", "wan"], "invalid choice: 'wan'"),
    "prompts": (["evaluate", "toy", "--prompts", "65"], r"prompts must be in 1\.\.64.* got 65"),
    "parts": (["evaluate", "toy", "--parts", "0"], "--parts must be a whole number of at least 1, got 0"),
    "many parts": (["evaluate", "toy", "--num-frames", "12", "--parts", "13"], "--parts must be at most the frames of"),
    "json": (["evaluate", "toy", "--json", "no/a.json"], "cannot write no/a.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line(folder, here, capsys, name):
    arguments, message = WRONG[name]
    if arguments[:1] == ["generate"] and "--model" not in arguments:
        arguments = [*arguments, "--model", folder]
    line = refused(capsys, 2, *arguments)
    assert re.search(message, line)
    assert list(here.iterdir()) == []


def test_unknown_keys_of_a_config_are_refused(here, capsys):
    (here / "c.yaml").write_text("out: a.mp4\nnum_frame: 6\n")
    assert "num_frame" in refused(capsys, 2, "generate", PROMPT, "--config", "c.yaml")


def test_a_broken_model_is_one_line(folder, here, capsys):
    (here / "m").mkdir()
    assert "config.json: no such file" in refused(capsys, 2, "generate", PROMPT, "-o", "a.mp4", "--model", "m")
    assert "neither a folder" in refused(capsys, 2, "generate", PROMPT, "-o", "a.mp4", "--model", "n")
    assert [p.name for p in here.iterdir()] == ["m"]


def test_not_finite_and_black(folder, here, capsys, monkeypatch):
    def broken(*arguments, **options):
        model = load_video_model(*arguments, **options)
        model.transformer.head.head.bias.fill_(float("nan"))
        return model

    with monkeypatch.context() as patch:
        patch.setattr(registry, "load_video_model", broken)
        assert "step" in refused(capsys, 1, "generate", PROMPT, "-o", "a.mp4", "--model", folder)
    monkeypatch.setattr(ToyDecoder, "decode", lambda self, latents: torch.zeros(BLOCK, 8, 8, 3).byte().numpy())
    assert "all black: step 1, block 0" in refused(capsys, 1, "generate", PROMPT, "-o", "a.mp4", "--model", folder)
    assert list(here.iterdir()) == []


def test_interrupt(folder, here, capsys, monkeypatch):
    decode, calls = ToyDecoder.decode, []

    def interrupted(self, latents):
        calls.append(latents)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return decode(self, latents)

    monkeypatch.setattr(ToyDecoder, "decode", interrupted)
    assert refused(capsys, 130, "generate", PROMPT, "-o", "a/", "--model", folder) == "hiar: interrupted"
    assert list(here.iterdir()) == []


def test_a_video_is_not_overwritten(folder, here, capsys):
    Path("a.mp4").write_bytes(b"mine")
    assert "a.mp4 exists: give another name, or --overwrite" in refused(
        capsys, 2, "generate", PROMPT, "-o", "a.mp4", "--model", folder
    )
    assert Path("a.mp4").read_bytes() == b"mine" and [*here.iterdir()] == [here / "a.mp4"]
    assert run("generate", PROMPT, "-o", "a.mp4", "--model", folder, "--overwrite") == 0
    assert Path("a.mp4").read_bytes() != b"mine"


@pytest.mark.parametrize("blocks", [0, 2])
def test_ctrl_c_among_processes_says_what_is_kept(here, capsys, monkeypatch, blocks):
    from torch.distributed.launcher import api

    def interrupted(*_):
        Path("a.mp4.blocks").mkdir()
        for block in range(blocks):
            Path(f"a.mp4.blocks/block_{block:08d}.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "elastic_launch", lambda *_: interrupted)
    kept = "; 2 finished blocks are in a.mp4.blocks, continue with --resume" if blocks else ""
    assert refused(capsys, 130, "generate", PROMPT, "-o", "a.mp4", "--nproc", "2") == f"hiar: interrupted{kept}"


def test_debug_shows_where(capsys):
    assert run("--debug", "generate", PROMPT, "-o", "a.avi") == 2
    told = capsys.readouterr().err
    assert "Traceback" in told and "check_target" in told and told.splitlines()[-1].startswith("hiar: cannot write")


# hiar train, evaluate, doctor


TINY = ["updates=2", "batch_size=1", "num_latent_frames=6", "log_every=1", "precision=float32", "optimizer.lr=1e-3"]
TINY += ["scale.threads=1", "sample_every=0"]


def test_train_resume_generate(here, capsys):
    assert run("train", TOY, *TINY, "--out", "run") == 0
    told = capsys.readouterr()
    first, *_, model, hint = told.out.splitlines()
    assert first.startswith("memory: 0.0") and model == "model: run/model" and hint.startswith("try: hiar generate")
    assert not told.err
    assert {p.name for p in (here / "run").iterdir()} >= {"model", "loss.csv", "states"}
    assert (here / "run/loss.png").exists() and "loss plot: run/loss.png" in told.out
    assert run("train", TOY, *TINY, "--out", "run") == 0
    assert "resuming from update 2 of run/states/update_00000002" in capsys.readouterr().out
    assert "another batch_size" in refused(capsys, 2, "train", TOY, *TINY, "batch_size=2", "--out", "run")
    assert run("generate", PROMPT, "-o", "a.mp4", "--model", "run/model", "--num-frames", BLOCK) == 0
    model = load_video_model("run/model", "cpu")
    assert (model.train_frames, model.num_frames) == (6, 24)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_ctrl_c_in_training_writes_a_state(here, capsys, monkeypatch, number):
    update, seen = Trainer._update, []

    def interrupted(self):
        seen.append(self.update)
        if len(seen) == 2:
            signal.raise_signal(number)
        return update(self)

    before = signal.getsignal(number)
    monkeypatch.setattr(Trainer, "_update", interrupted)
    words = ["train", TOY, *TINY, "updates=4", "--out", "run"]
    assert run(*words) == 130
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        "stopping after this update, with a saved state; Ctrl-C again: at once",
        "hiar: interrupted; after 2 of 4 updates; the same command resumes from run/states/update_00000002",
    ]
    assert "4 updates, batches of 1; losses of every update: run/loss.csv" in told.out
    assert signal.getsignal(number) is before
    assert run(*words) == 0 and seen == [0, 1, 2, 3]
    assert len((here / "run/loss.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize("window, rows, ended", [
    (100, 2, "after 2 of 4 updates; the same command resumes from run/states/update_00000002"),
    (-1, 1, "the same command resumes from the start"),
])  # fmt: skip
def test_a_second_signal_in_training(here, capsys, monkeypatch, window, rows, ended):
    """One that follows closely is the first once more, as a scheduler and a launcher send it; else it ends at once."""
    update = Trainer._update

    def interrupted(self):
        for _ in range(2 if self.update == 1 else 0):
            signal.raise_signal(signal.SIGUSR1)  # the warning ahead does not count
            signal.raise_signal(signal.SIGTERM)
        return update(self)

    monkeypatch.setattr(Trainer, "_update", interrupted)
    monkeypatch.setattr(train, "ONE_SIGNAL", window)
    assert run("train", TOY, *TINY, "updates=4", "--out", "run") == 130
    assert capsys.readouterr().err.splitlines()[1:] == [f"hiar: interrupted; {ended}"]
    assert len((here / "run/loss.csv").read_text().splitlines()) == rows + 1


def test_training_out_of_memory_names_the_keys_that_need_less(here, capsys, monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")

    monkeypatch.setattr(Trainer, "_update", full)
    assert run("train", TOY, *TINY, "--out", "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hiar: training is out of memory: 2.50 GiB at once; scale.micro_batch=1, scale.activation_")


@pytest.mark.parametrize("recipe, key, made_by", [
    ("toy/ode_pairs", "teacher", "toy/teacher"), ("toy/ode_init", "init", "toy/teacher"),
    ("toy/hiar", "init", "toy/ode_init"), ("wan-1.3b/hiar", "init", "wan-1.3b/ode_init"),
])  # fmt: skip
def test_a_missing_stage_names_the_command_that_makes_it(capsys, recipe, key, made_by):
    line = refused(capsys, 2, "train", recipe)
    assert line.startswith(f"hiar: {key} runs/{made_by}") and f"hiar train {made_by} makes it" in line


def test_two_trainings_of_one_folder(here, capsys):
    """The second would write into the losses and states of the first."""
    folder = here / "run"
    with run_folder_held(folder):  # or the temporary files of the shards that both make
        line = refused(capsys, 2, "train", "toy/teacher", "updates=1", "--out", folder)
        pairs = refused(capsys, 2, "train", "toy/ode_pairs", "teacher=toy", "--out", folder)
    assert line == f"hiar: another process trains in {folder}: wait for it, or choose another --out"
    assert pairs == line.replace("trains", "works")
    assert not folder.exists()  # nothing was put there
    with run_folder_held(folder):
        (folder / "loss.csv").touch()
    assert folder.exists()


def test_evaluate(folder, here, capsys):
    options = ["--prompts", 2, "--num-frames", "[6]", "--json", "e.json", "--overwrite"]
    (here / "e.json").touch()
    assert run("evaluate", "toy", "--model", folder, *options) == 0
    table = capsys.readouterr().out
    assert "| step_first  |      6 |" in table and "| block_first |      6 |" in table
    assert "2 held-out prompts, seed 0, 2 steps" in table
    figures = json.loads((here / "e.json").read_text())
    assert figures["weights_sha256"] == load_video_model(folder, "cpu").weights_sha256
    assert [(row["rollout"]["order"], row["num_frames"], len(row["parts"])) for row in figures["rows"]] == [
        ("step_first", 6, 6), ("block_first", 6, 6),
    ]  # fmt: skip
    assert [p.name for p in here.iterdir()] == ["e.json"]


def test_doctor(capsys):
    assert run("doctor") == 0
    told = capsys.readouterr().out
    topics = ("package", "python", f"torch {torch.__version__}", "devices", "CUDA extension", "op attention", "model")
    for topic in topics:
        assert topic in told, topic
    assert "not built: " in told or "built for sm_" in told
    assert run("doctor", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    measured = content.pop("attention measured")
    assert {line.partition(": ")[0] for line in told.splitlines()} == {*content, "attention measured"}
    assert all(isinstance(value, str) for value in [*content.values(), *measured])
    assert f"torch {torch.__version__}" in content["libraries"] and len(measured) > 1
    assert run("doctor", "--json", "--model", "toy") == 2
    assert "--json is of the report without --model" in capsys.readouterr().err


# The process


def test_the_module_is_the_command():
    def process(*words):
        program = [sys.executable, "-m", "hiar_model", *words]
        return subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])

    right, wrong = process("--version"), process("x")
    assert right.returncode == 0 and right.stdout.startswith("hiar ")
    assert wrong.returncode == 2 and wrong.stderr.startswith("hiar: ") and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["generate"], ["train"], ["evaluate"], ["doctor"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    assert done.value.code == 0 and "usage: hiar" in capsys.readouterr().out


def test_nothing_asked_for_prints_help(capsys):
    assert main([]) == 0
    told = capsys.readouterr()
    assert "usage: hiar" in told.out and "doctor" in told.out and not told.err


LIGHT = {
    **{f"{command} --help": ([command, "--help"], "usage: hiar") for command in COMMANDS},
    "help": (["--help"], "usage: hiar"), "bare": ([], "usage: hiar"), "version": (["--version"], "hiar"),
    "order": (["generate", PROMPT, "-o", "a.mp4", "--order", "foo"], "--order must be one of step_first, stream, wa"),
    "steps": (["generate", PROMPT, "-o", "a.mp4", "--steps", "0"], "--steps must be .* from 1 to 1000, got 0"),
    "dtype": (["generate", PROMPT, "-o", "a.mp4", "--dtype", "bf16"], "--dtype must be one of float32, bfloat16"),
    "cache dtype": (["generate", PROMPT, "-o", "a.mp4", "--kv-dtype", "fp8"], "--kv-dtype must be one of"),
    "offload": (["generate", PROMPT, "-o", "a.mp4", "--offload", "text,vea"], "got 'vea'; did you mean vae?"),
    "model": (["generate", PROMPT, "-o", "a.mp4", "--model", "tooy"], "--model 'tooy' is neither .* did you mean toy?"),
    "image": (["generate", PROMPT, "-o", "a.mp4", "--image", "i.png"], "--image i.png: no such file"),
    "fps": (["generate", PROMPT, "-o", "a.mp4", "--fps", "-1"], "--fps must be a number from 0.01 to 1000, got -1"),
    "on nan": (["generate", PROMPT, "-o", "a.mp4", "--on-nan", "go"], "--on-nan must be one of stop, retry, got 'go'"),
    "8 bits": (["serve", "--dtype", "float8_e4m3fn"], "8 bits are for --kv-dtype, --attention-dtype, --linear"),
    "products": (["generate", PROMPT, "-o", "a.mp4", "--attention-dtype", "float8_e4m3fn"],
                 "--attention-dtype float8_e4m3fn needs --kv-dtype float8_e4m3fn: it is not set"),
    "implementation": (["generate", PROMPT, "-o", "a.mp4", "--attention-impl", "sdpa", "--kv-dtype", "float8_e4m3fn"],
                       "--attention-impl must be one of .* with --kv-dtype float8_e4m3fn, got 'sdpa'"),
    "one order": (["compare", PROMPT, "-o", "a.mp4", "--order", "stream"], "--order must be two or more different o"),
    "an order twice": (["compare", PROMPT, "-o", "a.mp4", "--order", "[stream,stream]"], "--order must be .* stream$"),
    "device": (["generate", PROMPT, "-o", "a.mp4", "--device", "gpu"], "--device must be one of auto, cpu, cuda"),
    "orders": (["evaluate", "toy", "--order", "[stream,steam]"], "--order must be .* got 'steam'; did you mean stream"),
    "ranks": (["verify-parity", "--nproc", "0"], "--nproc must be a whole number from 1 to"),
    "warmup": (["warmup", "--order", "foo"], "--order must be one of"),
    "bench": (["bench", "--model", "wan2.1"], "--model 'wan2.1' is neither a name nor a folder; names: toy, scenes, "),
    "a bench without a steady state": (["bench", "--order", "step_first"], "--order must have a steady state"),
    "a result": (["bench", "--compare", "a.json", "b.json"], "--compare a.json: no such file"),
    "doctor": (["doctor", "--model", "wan9"], "--model 'wan9' is no name, file or folder; names: toy, scenes, "),
    "layout": (["convert", "a", "b", "--to", "nativ"], "--to must be one of native, .*did you mean native"),
    **{f"no effect: {' '.join(words)}": (words, message) for words, message in [
        (["generate", PROMPT, "-o", "a.mp4", "--steps-per-rank", "[2,2]"], r"--steps-per-rank .* give --np.* \[2, 2"),
        (["generate", PROMPT, "-o", "a.mp4", "--dedicated-decoder-rank"], "--dedicated-decoder-rank has no effect wi"),
        (["generate", PROMPT, "-o", "a.mp4", "--resume"], "--resume has no effect .*, or --parallel pipeline$"),
        (["generate", PROMPT, "-o", "a.mp4", "--timeout", "9"], "--timeout has no effect without a pipeline"),
        (["generate", PROMPT, "-o", "a.mp4", "--parallel", "ulysses"], "--parallel has no effect in one process: give"),
        (["generate", PROMPT, "-o", "a.mp4", "--nproc", "2", "--parallel", "ulysses", "--checkpoint-every", "2"],
         "--checkpoint-every has no effect without a pipeline"),
        (["generate", PROMPT, "-o", "a.mp4", "--on-prompt-change", "recache"], "has no effect with one prompt: give"),
        (["verify-parity", "--nproc", "1", "--steps-per-rank", "measured"], "--steps-per-rank .* got measured"),
        (["doctor", "--model", "toy", "--vae-dtype", "float32"], "--vae-dtype has no effect on toy, which has no"),
        (["bench", "--compare", __file__, __file__, "--plot", "a.png"], "--plot has no effect beside --compare"),
    ]},
    **{f"empty {words[-1]}": ([*words, ""], f"^hiar: {words[-1]} must hold something, got ''") for words in [
        *(["generate", PROMPT, "-o", "a.mp4", name] for name in (
            "--checkpoint", "--vae", "--session", "--from-session", "--extend", "--prompts", "--prompt-cache")),
        ["bench", "--json"], ["bench", "--plot"], ["serve", "--data"], ["serve", "--token-file"],
    ]},
    "recipe": (["train", "toy/teachr"], "no recipe 'toy/teachr': .*; did you mean toy/teacher?"),
}  # fmt: skip
"""What is answered before torch is imported, which takes seconds: half a second for each `--help`."""


def test_mistakes_and_help_do_not_wait_for_torch():
    script = (
        "import json, sys\nfrom hiar_model.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n        code = main(words)\n    except SystemExit as done:\n        code = done.code\n"
        "    slow = [name for name in ('torch', 'numpy', 'av', 'rich') if name in sys.modules]\n"
        "    print(f'END {code} {slow}', flush=True)\n"
    )
    words = json.dumps([words for words, _ in LIGHT.values()])
    done = subprocess.run(
        [sys.executable, "-c", script, words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    told = re.split(r"END (\d .*)\n", done.stdout)[:-1]
    for (name, (_, message)), said, end in zip(LIGHT.items(), told[::2], told[1::2], strict=True):
        assert re.search(message, said) and end[2:] == "[]", (name, said, end)


@pytest.mark.parametrize("message, typed", [
    ("num_frames must fill whole blocks", "--num-frames must fill whole blocks"),
    ("window_frames=2 is not legal", "--window-frames=2 is not legal"),
    ("seed must be", "--seed must be"),
    ("the seed is wrong", "the seed is wrong"),
    ("cannot read runs/num_frames of: no", "cannot read runs/num_frames of: no"),
    ("model 'seed' is no folder", "model 'seed' is no folder"),
    ("image a.png and extend b.mp4 exclude each other", "--image a.png and --extend b.mp4 exclude each other"),
    ("a.gif: cannot read '.gif'; for a clip use extend", "a.gif: cannot read '.gif'; for a clip use --extend"),
    ("model toy takes no vae, got 'seed'", "--model toy takes no --vae, got 'seed'"),
])  # fmt: skip
def test_names_as_they_are_typed(message, typed):
    assert as_typed(message, ["num_frames", "window_frames", "seed", "model", "image", "extend", "vae"]) == typed


@pytest.mark.parametrize("command", COMMANDS)
def test_a_parser_of_one_command_is_that_command_s(command):
    """`main` builds only the options of the command that is typed: the others' take most of the time."""
    (of_one, of_all) = (build_parser(command), build_parser(None))
    assert of_one.format_help() == of_all.format_help()
    ours, theirs = (parsers._subcommands_action._name_parser_map for parsers in (of_one, of_all))
    assert ours[command].format_help() == theirs[command].format_help()
    assert " at 0x" not in ours[command].format_help()  # of a Python object
    assert all(len(parser._actions) == 1 for name, parser in ours.items() if name != command)  # --help
