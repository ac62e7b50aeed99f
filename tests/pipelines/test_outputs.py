"""What is written: checked before work starts, kept when something fails later; signals end a run as Ctrl-C does."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import small_toy
import torch
from PIL import Image
from safetensors import SafetensorError

from hiar_model import generate
from hiar_model.cli import main
from hiar_model.io.atomic import temporary
from hiar_model.io.files import as_name, as_text, check_output
from hiar_model.io.video import VideoWriter
from hiar_model.models.checkpoint import save_transformer
from hiar_model.models.registry import ToyDecoder
from hiar_model.rollout import state_io

pytestmark = pytest.mark.cpu

PROMPT = "a red circle moving right"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FULL = OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    small_toy.write_model(folder)
    return folder


@pytest.fixture
def run(small, tmp_path, monkeypatch):
    """`hiar generate` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield lambda out, *more, prompt=PROMPT: main(["generate", prompt, "-o", out, "--model", str(small), *more])
    torch.set_num_threads(threads)


def named(length: int, suffix: str) -> str:
    """A name of so many bytes, most of them in letters of three."""
    stem = length - len(suffix)
    return "猫" * (stem // 3) + "x" * (stem % 3) + suffix


def no_work(*_, **__):
    raise AssertionError("work began")


# Names


@pytest.mark.parametrize("suffix", [".mp4", ".gif", "/"])
@pytest.mark.parametrize("length", [238, 240, 250])
def test_a_long_name_is_written(run, tmp_path, length, suffix):
    name = named(length + (suffix == "/"), suffix)
    assert run(name, "--num-frames", str(small_toy.BLOCK)) == 0
    record = tmp_path / name / "video.json" if suffix == "/" else tmp_path / f"{name}.json"
    assert json.loads(record.read_text())["file"] == name.rstrip("/")
    assert len(list(tmp_path.iterdir())) == (1 if suffix == "/" else 2)


@pytest.mark.parametrize(("length", "suffix"), [(251, ".mp4"), (255, ".mp4"), (256, ".mp4"), (257, "/"), (251, ".gif")])
def test_a_name_that_is_too_long_is_refused_before_work(run, tmp_path, monkeypatch, capsys, length, suffix):
    monkeypatch.setattr("hiar_model.cli.generate.load_for_video", no_work)
    assert run(named(length, suffix)) == 2
    assert capsys.readouterr().err.rstrip().endswith(": File name too long")
    assert not list(tmp_path.iterdir())


def test_names_of_utf8_where_the_locale_reads_ascii(small, tmp_path):
    """A name is bytes of the file system; as text, in the record and in messages, it is UTF-8."""
    Image.new("RGB", (32, 32)).save(tmp_path / "crème.png")
    script = (
        "import sys; from hiar_model.cli import main\n"
        "out, image, model = sys.argv[1:]\n"
        "assert sys.getfilesystemencoding() == 'ascii' and not out.isascii()\n"
        f"made = main(['generate', {PROMPT!r}, '-o', out, '--image', image, '--num-frames', '4', '--model', model])\n"
        "sys.exit(made or main(['generate', '--config', out + '.json', '-o', out + '.gif']))\n"
    )
    environment = {**ENVIRONMENT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", script, "größe.mp4", "crème.png", str(small)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, timeout=300, capture_output=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.decode().splitlines()
    assert first.startswith("größe.mp4: 4 frames, ") and second.startswith("größe.mp4.gif: 4 frames")
    record = json.loads((tmp_path / "größe.mp4.json").read_text(encoding="utf-8"))
    assert record["file"] == "größe.mp4" and "./crème.png" in shlex.split(record["command"])
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("typed, text", [("crème", "crème"), ("cr\udcc3\udca8me", "crème"), ("\udce9", "\udce9")])
def test_words_of_the_command_line_as_text(typed, text):
    assert as_text(typed) == text and as_name(typed) == typed


@pytest.mark.parametrize("out", ["cr\udce9e.mp4", "cr\udce9e/", "\udce9/v.mp4"])
def test_a_name_that_is_no_utf8(run, tmp_path, monkeypatch, capsys, out):
    monkeypatch.setattr("hiar_model.cli.generate.load_for_video", no_work)
    os.mkdir(b"\xe9")
    assert run(out) == 2
    assert r"\udce9" in (line := capsys.readouterr().err) and "is not UTF-8 at character" in line
    assert os.listdir(b".") == [b"\xe9"]


def test_a_prompt_that_is_no_utf8(run, small, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"^the prompt 'a cr\\udce9e' is not UTF-8 at character 5: give it in UTF-8$"):
        generate("a cr\udce9e", model=small)
    monkeypatch.setattr("hiar_model.cli.generate.load_for_video", no_work)
    assert run("v.mp4", prompt="a cr\udce9e") == 2
    assert "the prompt 'a cr\\udce9e' is not UTF-8 at character 5" in capsys.readouterr().err


def test_a_record_takes_what_is_no_text(tmp_path, small):
    """Such as the path of an image that somebody else named."""
    video = generate(PROMPT, model=small)
    video.metadata["given"] = "cr\udce9e.png"
    video.save(tmp_path / "v.mp4")
    assert json.loads((tmp_path / "v.mp4.json").read_text(encoding="utf-8"))["given"] == "cr\udce9e.png"


def test_a_name_that_stdout_cannot_spell(tmp_path, small):
    command = ["-m", "hiar_model", "generate", PROMPT, "-o", "猫.mp4", "--model", str(small)]
    done = processes.run(command, cwd=tmp_path, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.startswith(r"\u732b.mp4: "), done.stderr


def test_a_temporary_name_is_short_and_its_own(tmp_path):
    names = [temporary(tmp_path / named(length, ".mp4")).name for length in (10, 255)]
    assert len(set(names)) == 2 and max(map(len, names)) < 40


LONG, PLOT = named(256, ".out"), named(256, ".png")
OUTPUTS = {  # a command, and what it would do first
    "session": (["generate", PROMPT, "-o", "v.mp4", "--session", LONG], "hiar_model.cli.generate.load_for_video"),
    "evaluation": (["evaluate", "toy", "--json", LONG], "hiar_model.cli.evaluate.load_model"),
    "bench": (["bench", "--model", "toy", "--json", LONG], "hiar_model.benchmark.run.bench"),
    "plot of an evaluation": (["evaluate", "toy", "--plot", PLOT], "hiar_model.cli.evaluate.load_model"),
    "plot of a bench": (["bench", "--model", "toy", "--plot", PLOT], "hiar_model.benchmark.run.bench"),
    "comparison": (["compare", PROMPT, "-o", LONG.replace(".out", ".mp4")], "hiar_model.cli.compare.load_for_video"),
    "weights": (
        ["convert", "IN", LONG.replace(".out", ".safetensors"), "--to", "native"],
        "hiar_model.models.convert.read_checkpoint",
    ),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_output_is_checked_before_work(tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    words, first = OUTPUTS[output]
    monkeypatch.setattr(first, no_work)
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.startswith("hiar: cannot write ") and line.endswith(": File name too long\n")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_an_output(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: it is a folder$"):
        check_output(tmp_path / "folder")
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(ValueError, match="it is a folder$"):
        save_transformer(None, tmp_path / "w.safetensors")  # type: ignore[arg-type]


# What fails later


def full(*_, **__):
    raise FULL


def test_a_full_disk_is_said_of_the_video(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hiar_model.io.video.Mp4Encoder.add", full)
    assert run("v.mp4") == 2
    assert capsys.readouterr().err == "hiar: cannot write v.mp4: No space left on device\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["v.mp4", "v.gif", "v/"])
def test_a_video_stays_where_its_record_fails(tmp_path, small, monkeypatch, out):
    video = generate(PROMPT, model=small, num_frames=small_toy.BLOCK)
    if out != "v/":
        (tmp_path / f"{out}.json").write_text('"of an older video"')
    writer = VideoWriter(tmp_path / out, video.fps)
    with pytest.raises(OSError, match=r"without its record: cannot write .*json: No space left"), writer:
        writer.write(video.frames)
        monkeypatch.setattr(Path, "write_bytes", full)
    assert [p.name for p in tmp_path.iterdir()] == [out.rstrip("/")]


def test_a_video_stays_where_its_session_fails(run, tmp_path, monkeypatch, capsys):
    def torn(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state_io, "save_tensors", torn)
    assert run("v.mp4", "--session", "s.safetensors", "--order", "stream") == 2
    line = capsys.readouterr().err
    assert line.startswith("hiar: cannot write s.safetensors: ") and "No space left on device" in line
    assert line.endswith("v.mp4 is complete, 12 frames\n") and line.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"v.mp4", "v.mp4.json"}


@pytest.mark.parametrize("out", ["v.mp4", "v.gif", "v/"])
def test_what_another_process_writes_meanwhile_stays(run, tmp_path, monkeypatch, capsys, out):
    """Two runs of one command: the second video replaced the first, or a folder was lost when all was made."""
    decode, name = ToyDecoder.decode, out.rstrip("/")

    def meanwhile(self, latents):
        target = tmp_path / name
        if out == "v/":
            target.mkdir(exist_ok=True)
            target = target / "frame.png"
        target.write_text("theirs")
        (tmp_path / "s").write_text("theirs")
        return decode(self, latents)

    monkeypatch.setattr(ToyDecoder, "decode", meanwhile)
    assert run(out, "--session", "s", "--order", "stream") == 0
    printed = capsys.readouterr()
    mine = "v-2" if out == "v/" else out.replace("v", "v-2")
    assert f"{name} was written by another process meanwhile: this result is {mine}" in printed.err
    assert "s was written by another process meanwhile: this result is s-2" in printed.err
    assert printed.out.startswith(f"{mine}: 12 frames")
    record = tmp_path / mine / "video.json" if out == "v/" else tmp_path / f"{mine}.json"
    assert json.loads(record.read_text())["file"] == mine
    theirs = tmp_path / "v" / "frame.png" if out == "v/" else tmp_path / name
    assert theirs.read_text() == (tmp_path / "s").read_text() == "theirs"
    assert len({p.name for p in tmp_path.iterdir()}) == (4 if out == "v/" else 5)


# Signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("session", [False, True])
def test_a_signal_ends_a_run_as_ctrl_c_does(run, tmp_path, monkeypatch, capsys, name, session):
    number, write = getattr(signal, name), VideoWriter.write

    def interrupted(writer, frames):
        write(writer, frames)
        signal.raise_signal(number)

    monkeypatch.setattr(VideoWriter, "write", interrupted)
    heard = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(number, heard)  # a suite that runs under nohup hears no SIGHUP
    more = ["--session", "s.safetensors"] if session else []
    try:
        assert run("v.mp4", "--order", "stream", *more) == 130
        assert signal.getsignal(number) == heard
    finally:
        signal.signal(number, before)
    goes_on = "frames are in v.mp4, resume with --from-session s.safetensors"
    assert capsys.readouterr().err.startswith("hiar: interrupted") and "Traceback" not in capsys.readouterr().err
    there = {p.name for p in tmp_path.iterdir()}
    assert there == ({"v.mp4", "v.mp4.json", "s.safetensors"} if session else set()), goes_on


def test_a_hangup_that_is_switched_off_stays_so(run, tmp_path, monkeypatch):
    """As nohup does."""
    write, before = VideoWriter.write, signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def hung_up(writer, frames):
        signal.raise_signal(signal.SIGHUP)
        write(writer, frames)

    monkeypatch.setattr(VideoWriter, "write", hung_up)
    try:
        assert run("v.mp4", "--order", "stream") == 0 and (tmp_path / "v.mp4").exists()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_terminated_process_leaves_nothing_half(tmp_path, small, nproc):
    words = ["generate", PROMPT, "-o", "v.mp4", "--model", str(small), "--num-frames", "3000", "--order", "stream"]
    process = processes.Started(["-m", "hiar_model", *words, "--nproc", nproc, "--timeout", "60"], cwd=tmp_path)
    while not any(".partial" in p.name for p in tmp_path.iterdir()):  # the video begins
        assert process.poll() is None, process.said()
        signal.sigtimedwait([], 0.05)
    process.kill(signal.SIGTERM)
    done = process.done()
    line = done.stderr
    assert done.returncode == 130 and "interrupted" in line and "Traceback" not in line, line
    assert {p.name for p in tmp_path.iterdir()} <= {"v.mp4.blocks"}


# Two names for one file, closed streams, who may read


@pytest.mark.parametrize("out, more, culprits", [
    ("a.mp4", ["--session", "a.mp4"], "--session and -o are one file"),
    ("a.mp4", ["--session", "./a.mp4.json"], "--session and the metadata of -o are one file"),
    ("link.mp4", ["--session", "real.mp4"], "--session and -o are one file"),
    ("new/", ["--session", "new"], "--session and -o are one file"),
    ("real.mp4", ["--extend", "real.mp4"], "-o would replace real.mp4, which --extend reads"),
    ("a.mp4", ["--prompts", "a.mp4.json"], "the metadata of -o would replace a.mp4.json, which --prompts reads"),
    ("real.mp4", ["--from-session", "real.mp4"], "-o would replace real.mp4, which --from-session reads"),
    ("a.mp4", ["--extend", "real.mp4", "--session", "link.mp4"], "--session would replace real.mp4, which --extend"),
])  # fmt: skip
def test_no_output_replaces_another_or_what_is_read(run, capsys, monkeypatch, out, more, culprits):
    """The session took the video's place, and the last line said that the video was there."""
    for name in ("real.mp4", "a.mp4.json"):
        Path(name).write_text("kept")
    Path("link.mp4").symlink_to("real.mp4")
    monkeypatch.setattr("hiar_model.pipelines.video_pipeline.VideoRun", no_work)
    assert run(out, "--overwrite", "--order", "stream", *more) == 2
    assert culprits in capsys.readouterr().err
    assert Path("real.mp4").read_text() == Path("a.mp4.json").read_text() == "kept"


def test_a_session_may_take_the_place_of_the_one_it_goes_on_from(run, capsys):
    assert run("a.mp4", "--num-frames", "3", "--order", "stream", "--session", "s") == 0
    assert run("b.mp4", "--num-frames", "6", "--order", "stream", "--from-session", "s", "--session", "s") == 0
    capsys.readouterr()
    before = Path("s").read_bytes()
    assert run("c.mp4", "--num-frames", "3", "--order", "stream", "--session", "s") == 2
    assert "--session s exists: give another name, --from-session to go on" in capsys.readouterr().err
    assert Path("s").read_bytes() == before and not Path("c.mp4").exists()


def test_closed_streams(small, tmp_path):
    """Of cron or a service: nothing was made, and nothing said why."""
    words = [sys.executable, "-m", "hiar_model", "generate", f"'{PROMPT}'", "-o", "a.mp4", "--num-frames", "3"]
    line = " ".join([*words, "--model", str(small), "<&- >&- 2>&-"])
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, timeout=300).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.mp4.json"}


@pytest.mark.parametrize("number, name", [(1, "stdout"), (2, "stderr")])
def test_a_closed_stream(small, tmp_path, number, name):
    """As the interpreter begins where one is closed: the first file that is opened takes its number."""
    code = f"import os, runpy, sys; os.close({number}); sys.{name} = sys.__{name}__ = None\n"
    code += "sys.argv[0] = 'hiar'; runpy.run_module('hiar_model', run_name='__main__')"
    words = ["generate", PROMPT, "-o", "a.mp4", "--num-frames", "3", "--model", str(small)]
    assert processes.run(["-c", code, *words], cwd=tmp_path).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.mp4.json"}


class Full(io.StringIO):
    """Of a disk that is full; buffers nothing."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


GONE = OSError(32, "Broken pipe")


@pytest.mark.parametrize("error, code, line", [
    (FULL, 1, "hiar: cannot write standard output: No space left on device; all else is done\n"),
    (GONE, 141, ""),
])  # fmt: skip
def test_a_standard_output_that_cannot_be_written(run, tmp_path, monkeypatch, capsys, error, code, line):
    """It was exit status 2, of illegal input, though the video was whole; its file goes on being written."""
    stream = Full(error)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run("a.mp4", "--num-frames", "3") == code
    assert sys.stdout is stream and capsys.readouterr().err == line
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.mp4.json"}


def test_a_standard_error_that_cannot_be_written(run, tmp_path, monkeypatch, capsys):
    stream = Full(FULL)
    monkeypatch.setattr(sys, "stderr", stream)
    assert run("a.gif", "--num-frames", "3") == 0 and capsys.readouterr().out.startswith("a.gif: 3 frames")
    assert run("a.gif") == 2  # it is there


def test_a_full_disk_at_the_last_flush():
    """What is buffered fails when it is flushed, at the latest at exit, where Python would say so itself."""
    line = f"{sys.executable} -m hiar_model --help > /dev/full"
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["sh", "-c", line], env=environment, timeout=300, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "hiar: cannot write standard output: No space left on device; all else is done\n"


def test_others_may_read_what_is_written(small, tmp_path):
    """As they may any file that is made here: safetensors' own writer leaves it to the owner alone."""
    (tmp_path / "plain").touch()
    state_io.write(tmp_path / "state", {"x": torch.zeros(1)}, {})
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_error_of_the_system_is_told_without_its_number(run, capsys, monkeypatch):
    def refuse(*_, **__):
        raise FileExistsError(17, "File exists", "a place")

    monkeypatch.setattr("hiar_model.pipelines.video_pipeline.VideoRun", refuse)
    assert run("a.mp4") == 2
    assert capsys.readouterr().err == "hiar: a place: File exists\n"


def test_the_metadata_of_another_video_is_not_replaced(small, here, capsys):
    """Left without its video: replaced if it says what the new one says, else refused before any work."""
    words = ["generate", PROMPT, "-o", "a.mp4", "--model", str(small), "--num-frames", "6"]
    record, advice = Path("a.mp4.json"), "give another name, or --overwrite\n"
    assert main(words) == 0
    written = record.read_bytes()
    Path("a.mp4").unlink()
    assert main(words) == 0 and record.read_bytes() == written
    Path("a.mp4").unlink()
    capsys.readouterr()
    for more, line in (
        (["--seed", "7"], "seed was 0, now it is 7"),
        (["--num-frames", "9"], "--num-frames was 6, now it is 9"),  # what is known with the model
    ):
        assert main([*words, *more]) == 2
        assert capsys.readouterr().err == f"hiar: a.mp4.json exists and is of another video: {line}: {advice}"
    for mine in (b"mine", b"[1]", b'{"file": "b.mp4", "frames": 3}', b'{"file": "a.mp4"}', b"\xff\xfe\xff"):
        record.write_bytes(mine)
        assert main(words) == 2
        assert capsys.readouterr().err == f"hiar: a.mp4.json exists and is no metadata of a.mp4: {advice}"
        assert record.read_bytes() == mine and [*here.iterdir()] == [here / "a.mp4.json"]
    assert main([*words, "--overwrite"]) == 0 and json.loads(record.read_text())["frames"] == 6
