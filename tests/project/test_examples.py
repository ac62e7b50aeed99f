"""The scripts and the notebook of examples/ run, at a small size, and show what they say."""

from __future__ import annotations

import ast
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import av
import numpy as np
import processes
import pytest
import torch
import wan_files
from diffusers import WanPipeline
from toy_codec import codec_once  # noqa: F401 (fixture)

from hiar_model.integrations.diffusers import HiARPipeline

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("here")]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
LONGEST = 40  # lines below the docstring


def run(name: str, **sizes: Any) -> Any:
    """What the main function of a script returns."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**sizes)


def frames(path: str) -> np.ndarray:
    """uint8 [F, H, W, 3]."""
    with av.open(path) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_generate(here):
    run("generate", num_frames=6)
    assert frames("circle.mp4").shape[0] == 6 and Path("circle.mp4.json").exists()


def test_stream_to_a_file(here):
    run("stream", path="plus.mp4", blocks=2)
    assert frames("plus.mp4").shape[0] == 6


def test_stream_to_a_window(monkeypatch):
    """Every frame is shown; a window that is closed ends the stream, which has no end itself."""
    shown = []

    class TclError(Exception):
        pass

    class Label:
        def __init__(self, window):
            self.pack = lambda: None

        def configure(self, image):
            if len(shown) == 4:
                raise TclError
            shown.append(image)

        def update(self):
            pass

    tkinter = types.SimpleNamespace(Tk=lambda: None, Label=Label, TclError=TclError)
    picture = types.SimpleNamespace(PhotoImage=lambda image: np.asarray(image))
    monkeypatch.setitem(sys.modules, "tkinter", tkinter)
    monkeypatch.setitem(sys.modules, "PIL.ImageTk", picture)
    monkeypatch.setattr("PIL.ImageTk", picture, raising=False)
    run("stream")
    assert len(shown) == 4 and all(image.shape == (512, 512, 3) and image.std() > 1 for image in shown)


def test_rollout_on_latents():
    assert run("rollout_latents", num_latent_frames=9) < 1e-5


def test_attention_with_a_mask(capsys):
    weights = run("attention_mask", frames=12)
    said = capsys.readouterr().out.splitlines()
    assert said[6] == "  6  #...#####..." and said[-1] == "the same with shuffled keys: True"
    assert weights.shape == (12, 12) and torch.allclose(weights.sum(1), torch.ones(12), atol=1e-5)


def test_a_forked_session(here):
    videos = run("fork_session", num_frames=15, blocks=1)
    same, fork = videos["same"].frames, videos["fork"].frames
    assert len(same) == len(fork) == 15 and np.array_equal(same[:3], fork[:3])
    red, _, blue = fork[-1].reshape(-1, 3).max(0).astype(int)
    assert blue > red and not np.array_equal(same, fork)
    assert len(frames("fork.mp4")) == 15


def test_two_processes():
    done = processes.torchrun(2, EXAMPLES / "two_processes.py", 6)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "equal to one process: True" and done.stdout.count("block ") == 2


def test_distillation(here, capsys):
    sizes = {"teacher_updates": 1, "trajectories": 2, "student_updates": 1, "batch": 2}
    assert run("distil", **sizes, sample_every=0, num_frames=6) == 0, capsys.readouterr().err
    assert frames("student.mp4").shape[0] == 6
    for stage, file in (("teacher", "loss.csv"), ("student", "loss.png"), ("student", "model/model.safetensors")):
        assert Path("runs/distil", stage, file).exists(), file


def test_comparison(here, capsys):
    result = run("compare", num_frames=24, speed=4)
    assert len(frames("compare.mp4")) == result.frames_shown == 6 and result.plot.exists()
    said = capsys.readouterr().out.splitlines()
    assert all(len(line.split()) == 2 + 8 for line in said[:-1]) and said[0].startswith("block_first")


def test_in_diffusers_place(here, monkeypatch):
    """The script streams; with its two changed lines as they were it is one for WanPipeline, and does not."""
    wan_files.write_diffusers(Path("wan"))
    source = (EXAMPLES / "diffusers_pipeline.py").read_text(encoding="utf-8")
    before = source
    for line in source.splitlines():
        code, changed, was = line.partition("  # ")
        if changed:
            was = was.replace("(...)", code.partition("pipe.stream")[2].rstrip(":"))
            indented, is_loop, _ = code.partition(" in ")
            before = before.replace(line, f"{indented}{is_loop}{was}:" if is_loop else was)
    changes = zip(source.splitlines(), before.splitlines(), strict=True)
    assert sum(one != two for one, two in changes) == 2 and "hiar_model" not in before.partition("import argparse")[2]
    Path("before.py").write_text(before, encoding="utf-8")
    written = []
    monkeypatch.setattr("diffusers.utils.export_to_gif", lambda images, path, fps: written.append((len(images), fps)))
    options = {"folder": "wan", "prompt": wan_files.PROMPT, "device": "cpu", "num_frames": 21}
    options |= {"height": 16, "width": 32, "num_inference_steps": 2}
    run("diffusers_pipeline", **options)
    assert written == [(9, 16), (21, 16)]
    pipe = HiARPipeline.from_pretrained("wan", torch_dtype=torch.bfloat16)
    parts = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")}
    monkeypatch.setattr(WanPipeline, "from_pretrained", lambda *_, **options: WanPipeline(**parts))  # needs accelerate
    runpy.run_path("before.py")["main"](**options)
    assert written[2:] == [(21, 16)]


# The notebook. Its cells run without a kernel: the value of the last line of a cell is what a notebook shows.


def cells() -> list[dict[str, Any]]:
    return json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]


def shown(code: str, names: dict[str, Any]) -> Any:
    *body, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_runs(capsys):
    names: dict[str, Any] = {}
    videos = 0
    for cell in cells():
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace("num_frames = 48", "num_frames = 6")
            value = shown(code, names)
            if hasattr(value, "_repr_html_"):
                videos += 1
                assert value._repr_html_().startswith("<video ") and len(value) == 6
    said = capsys.readouterr().out
    assert videos == 3 and names["num_frames"] == 6
    assert "stream: equal to step_first: True" in said and "block_first: equal to step_first: False" in said


def test_the_notebook_is_stored_clean():
    """As nbformat 4.5 wants it: an id for each cell; no outputs, so that a change shows in a diff."""
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell.keys() - {"outputs", "execution_count"} == {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_says_what_one_sees(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree)
    assert docstring and "You see" in docstring and "Takes" in docstring
    lines = path.read_text(encoding="utf-8").splitlines()[tree.body[0].end_lineno :]
    assert sum(bool(line.strip()) for line in lines) <= LONGEST
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':\n")


def test_every_script_has_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(SCRIPTS) == 9
    for path in SCRIPTS:
        assert f'run("{path.stem}"' in source or f'"{path.name}"' in source, path.name
