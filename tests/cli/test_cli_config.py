"""`--config`: a file with everything in it is enough, what `--print_config` writes is such a file, a record too."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
from small_toy import PROMPT, small_folder  # noqa: F401 (fixtures)

from hiar_model.cli import build_parser, main
from hiar_model.cli.config_file import as_yaml, config_first
from hiar_model.io.files import load_yaml, read_text
from hiar_model.pipelines.prompt_schedule import PromptSchedule
from hiar_model.train.data.prompts import _read as read_prompts
from hiar_model.version import NOISE

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("here")]

OTHER = "a small blue square moving left"


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def record(name: str) -> dict:
    return json.loads(Path(f"{name}.json").read_text())


def write(name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")


def test_a_prompt_in_the_file(folder):
    write("c.yaml", f"prompt: {PROMPT}\nout: a.mp4\nmodel: {folder}\nnum-frames: 6\n")
    assert run("generate", "--config", "c.yaml") == 0
    assert (record("a.mp4")["prompt"], record("a.mp4")["num_frames"]) == (PROMPT, 6)


@pytest.mark.parametrize("words", [
    (OTHER, "--config", "c.yaml", "--seed", "5"), ("--config=c.yaml", "--seed", "5", OTHER),
    ("--seed", "5", OTHER, "--config", "c.yaml"),
])  # fmt: skip
def test_what_is_typed_counts_more_wherever_it_stands(words):
    write("c.yaml", f"prompt: {PROMPT}\nout: a.mp4\nseed: 4\nnum_frames: 6\n")
    told = build_parser().parse_args(config_first(["generate", *words]))["generate"]
    assert (told.prompt, told.seed, told.num_frames) == (OTHER, 5, 6)


def test_what_print_config_writes(folder, capsys):
    with pytest.raises(SystemExit):
        run("generate", PROMPT, "-o", "a.mp4", "--model", folder, "--num-frames", 6, "--window-frames", "[3,6]",
            "--steps", 2, "--print_config")  # fmt: skip
    write("c.yaml", capsys.readouterr().out)
    assert run("generate", "--config", "c.yaml") == 0
    assert (record("a.mp4")["rollout"]["window_frames"], record("a.mp4")["prompt"]) == ([3, 6], PROMPT)


@pytest.mark.parametrize("kind", ["a.mp4.json", "a/video.json"])
def test_the_record_of_a_video(folder, here, kind, capsys):
    name = "a/" if "/" in kind else "a.mp4"
    made = ["--num-frames", 9, "--seed", -5, "--steps", 3, "--order", "stream", "--window-frames", "[3,4,6]"]
    assert run("generate", PROMPT, "-o", name, "--model", folder, *made) == 0
    assert run("generate", "--config", kind, "-o", "b/") == 0
    assert run("generate", "--config", kind, "-o", "c/", "--seed", 6, OTHER) == 0
    first, again, other = (json.loads(Path(f).read_text()) for f in (kind, "b/video.json", "c/video.json"))
    same = {"file": "", "command": ""}
    assert {**again, **same} == {**first, **same}
    assert {**other, **same} == {**first, **same, "prompt": OTHER, "seed": 6}
    assert "another video" not in capsys.readouterr().err
    write("old.json", json.dumps(first | {"weights_sha256": "0" * 64}))
    assert run("generate", "--config", "old.json", "-o", "d/", "--num-frames", 3) == 0
    assert f"old.json: made by weights 000000000000, now {first['weights_sha256'][:12]}: " in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [
    ("num_frame: 6\n", "c.yaml: unknown key num_frame; did you mean num_frames?"),
    ("- 6\n", "c.yaml must hold key: value lines, got list"),
    ("", "c.yaml is empty, or all of it a comment: it must hold key: value lines"),
    ("# seed: 1\n", "c.yaml is empty, or all of it a comment: it must hold key: value lines"),
    ("offload: [text, disk]\n", "--offload must be one of text, vae, got 'disk'"),
    ("offload: {text: true}\n", "c.yaml: offload must be one text, got {'text': True}"),
    ("seed: 1\nnum_frames: 6\nseed: 2\n", "the key seed stands twice"),
    ("a: [\n", "c.yaml is neither YAML nor JSON"),
    ("num_frames: many\n", "many"),
    ('{"file": "a.mp4", "weights_sha256": "", "rollout": {}}', "metadata of a video that no command makes:"),
    ('{"command": "rm -r x", "weights_sha256": ""}', "c.yaml is the metadata of a video, for hiar generate only"),
    ('{"command": "hiar generate x", "weights_sha256": ""}', "c.yaml: its noise is 'torch-32', this version draws"),
    (None, "cannot read c.yaml: No such file"),
])  # fmt: skip
def test_a_file_that_is_none_is_one_line(capsys, text, message):
    if text is not None:
        write("c.yaml", text)
    assert run("generate", PROMPT, "-o", "a.mp4", "--config", "c.yaml") == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_words_between_commas_may_be_a_list(capsys):
    for memory in ("24GB,40GB", "[24GB, 40GB]"):
        write("c.yaml", f"model: toy\ngpu_memory: {memory}\n")
        assert run("doctor", "--config", "c.yaml") == 0
        output = capsys.readouterr().out
        assert "24.00 GB: fits" in output and "40.00 GB: fits" in output


@pytest.mark.parametrize("text, message", [
    ("num_frames: 3\nnum-frames: 6", "num_frames and num-frames are one option"),
    ("stage: teacher\nupdates: 5", "c.yaml is a recipe, no options of this command; hiar train c.yaml trains by it"),
    ("overwrite: maybe", "overwrite must be true or false, got 'maybe'"),
    ('overwrite: "false"', "overwrite must be true or false, got 'false'"),
    ("seed: 2020-01-01", "seed must be a whole number, got '2020-01-01'"),
    ("seed: 1:30", "c.yaml: seed must be a number, got '1:30'"),
    ("fps: 1:30.5", "c.yaml: fps must be a number, got '1:30.5'"),
    ("num_frames: 3\nprompt: [a, b]", "c.yaml: prompt must be one text, got ['a', 'b']"),
    ("num_frames: 3\nconfig: other.yaml", "c.yaml: config must not stand in a file of options, got 'other.yaml'"),
    ("[1, 2]: 3", "c.yaml is neither YAML nor JSON: "),
    ("[" * 5000, "c.yaml is neither YAML nor JSON: nested too deep"),
    *[(json.dumps({"weights_sha256": "", "noise": NOISE, "command": command}), message) for command, message in [
        (5, "c.yaml is the metadata of a video, for hiar generate only"),
        ("", "c.yaml is the metadata of a video, for hiar generate only"),
        ("hiar train toy/hiar", "c.yaml is the metadata of a video, for hiar generate only"),
        ("hiar generate 'x", "c.yaml: its command cannot be read: No closing quotation"),
        ("hiar generate x --config c.yaml", "c.yaml: its command has --config, which no video is made by"),
        ("hiar generate x --help", "c.yaml: its command has --help, which no video is made by"),
        ("hiar generate x --gone 5", "c.yaml: its command is not one of this version: unrecognized arguments: --gone"),
    ]],
])  # fmt: skip
def test_a_file_that_says_too_much_or_something_else(capsys, text, message):
    write("c.yaml", text)
    assert run("generate", PROMPT, "-o", "a.mp4", "--config", "c.yaml") == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


@pytest.mark.parametrize("written", ["no", "1:30", "1_000", "2024-05-06", "0x10", "010", "1e3", "~x"])
def test_a_prompt_is_the_text_that_stands_there(capsys, written):
    write("c.yaml", f"prompt: {written}\nmodel: toy")
    assert run("generate", "-o", "a.mp4", "--config", "c.yaml") == 2
    assert capsys.readouterr().err.startswith(f"hiar: prompt {written!r}: ")


def test_a_pipe_is_read_once(capsys):
    """As the shell's --prompts <(command) makes one: its beginning was lost to a look at it."""
    texts = {"--config": f"prompt: {PROMPT}\nmodel: toy\nnum_frames: 3", "--prompts": f"0 {PROMPT}"}
    for option, text in texts.items():
        reads, writes = os.pipe()
        os.write(writes, text.encode())
        os.close(writes)
        more = [] if option == "--config" else ["--num-frames", 3]
        assert run("generate", "-o", "a.mp4", "--overwrite", option, f"/dev/fd/{reads}", *more) == 0
        os.close(reads)
        assert record("a.mp4")["frames"] == 3
        assert ("shows from 0 s" in capsys.readouterr().err) == (option == "--prompts")


@pytest.mark.parametrize("typed", [["--seed", "1:30"], ["--seed=1:30"], ["--fps", "1:30.5"]])
def test_a_time_is_no_number(capsys, typed):
    assert run("generate", PROMPT, "-o", "a.mp4", *typed) == 2
    name, value = typed if len(typed) == 2 else typed[0].split("=")
    assert capsys.readouterr().err == f"hiar: {name} must be a number, got {value!r}\n"


def test_a_number_that_begins_with_0_is_decimal():
    assert load_yaml("a: 010\nb: [07, -010]\nc: 0x10\nd: 1_0\ne: 0\nf: 0.5") == {
        "a": "010", "b": ["07", "-010"], "c": 16, "d": 10, "e": 0, "f": 0.5,
    }  # fmt: skip
    write("c.yaml", "seed: 010")
    assert build_parser().parse_args(["generate", PROMPT, "-o", "a.mp4", "--config", "c.yaml"]).generate.seed == 10


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_files_as_editors_write_them(here, encoding, end):
    """A byte order mark became part of the first prompt to train on."""
    lines = f"0 {PROMPT}{end}1 a blue circle moving up{end}"
    Path("p.txt").write_bytes(b"\xfe\xff" + f"{lines}old\rMac".encode("utf-16-be"))
    assert read_text("p.txt") == f"0 {PROMPT}\n1 a blue circle moving up\nold\nMac"
    Path("p.txt").write_bytes(lines.encode(encoding))
    assert [line.prompt for line in PromptSchedule.read("p.txt").lines] == [PROMPT, "a blue circle moving up"]
    assert read_prompts("p.txt")[0] == f"0 {PROMPT}"
    Path("c.yaml").write_bytes(f"prompt: {PROMPT}{end}seed: 7{end}out: a.mp4{end}".encode(encoding))
    assert build_parser("generate").parse_args(["generate", "--config", "c.yaml"])["generate"].seed == 7


def test_a_record_belongs_to_generate(folder, capsys):
    assert run("generate", PROMPT, "-o", "a.mp4", "--model", folder) == 0
    assert run("doctor", "--config", "a.mp4.json") == 2
    assert "for hiar generate only" in capsys.readouterr().err


def test_a_recipe_by_a_file_too(capsys):
    write("c.yaml", "recipe: toy/teacher_forcing\nout: here\n")
    told = build_parser().parse_args(config_first(["train", "--config", "c.yaml"]))["train"]
    assert (told.recipe, told.out) == ("toy/teacher_forcing", "here")


def test_every_character_of_a_prompt_reaches_the_parser():
    """JSON writes those of more than 16 bits as two escapes, which YAML refuses; some end a line of YAML only."""
    several = [*range(0xD800), *range(0xE000, 0x10000), 0x1F408, 0x10FFFF]
    prompt = "".join(map(chr, several))
    assert load_yaml(as_yaml({"prompt": prompt}))["prompt"] == prompt


PROMPTS = [
    "a cat \U0001f408\U0001f408",
    "two\nlines",
    "'single' \"double\" \\ $HOME `x`",
    "\u2028\x85\x7f",
    "\\ud83d\\udc08",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_record_of_any_prompt_is_read(prompt):
    command = shlex.join(["hiar", "generate", prompt, "--seed", "3"])
    write("a.mp4.json", json.dumps({"command": command, "weights_sha256": "", "noise": NOISE}))
    options = build_parser("generate").parse_args(["generate", "--config", "a.mp4.json", "-o", "b.mp4"]).generate
    assert (options.prompt, options.seed) == (prompt, 3)
