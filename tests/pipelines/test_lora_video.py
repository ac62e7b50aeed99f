"""LoRA of a pipeline and of `hiar generate`: merged or beside the weights, recorded, repeated, switched in between."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

import lora_files
import numpy as np
import pytest
import refusals
import wan_files
from small_toy import PROMPT, small_folder, small_model  # noqa: F401 (fixtures)

from hiar_model import VideoPipeline, load_video_model
from hiar_model.cli import main

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("here", "equal_mp4")]

MODULES = {"blocks.0.self_attn.q": (2, 8.0), "blocks.0.ffn.2": (2, 8.0), "blocks.0.cross_attn.v": (2, 8.0)}


@pytest.fixture
def style(here, model) -> Path:
    return lora_files.write(here / "adapters", "kohya", model.transformer.state_dict(), MODULES)


def read(record: str) -> dict:
    return json.loads(Path(record).read_text())


def test_merged_and_beside_are_the_same_video(folder, model, style):
    options = {"num_frames": 12, "seed": 3}
    plain = VideoPipeline(model)(PROMPT, **options)
    merged = VideoPipeline(load_video_model(folder, "cpu", lora=(style, 0.5)))(PROMPT, **options)
    pipeline = VideoPipeline(model)
    assert pipeline.load_lora(style, 0.5) == "style"
    beside = pipeline(PROMPT, **options)
    far = np.abs(merged.frames.astype(int) - plain.frames).max()
    near = np.abs(merged.frames.astype(int) - beside.frames).max()
    assert far > 10 and near <= 1  # one level of 255: the sums are taken in another order
    assert np.array_equal(VideoPipeline(model)(PROMPT, **options).frames, plain.frames)
    for video in (merged, beside):
        (lora,) = video.metadata["lora"]
        assert lora == {"name": "style", "scale": 0.5, "file": str(style.resolve()),
                        "sha256": hashlib.sha256(style.read_bytes()).hexdigest()}  # fmt: skip
        assert f"--lora {style.resolve()}:0.5" in shlex.join(video.metadata["command"])
    assert "lora" not in plain.metadata


def test_a_scale_changes_between_blocks(model, style):
    pipeline = VideoPipeline(model)
    pipeline.load_lora(style, name="a")
    options = {"num_frames": 12, "order": "stream"}
    whole = pipeline(PROMPT, **options).frames
    run = pipeline.stream(PROMPT, **options)
    first = next(run)
    pipeline.set_lora_scale(0.0)
    rest = np.concatenate(list(run))
    assert np.array_equal(first, whole[: len(first)]) and not np.array_equal(rest, whole[len(first) :])
    assert np.array_equal(pipeline(PROMPT, **options).frames, VideoPipeline(model)(PROMPT, **options).frames)
    pipeline.set_lora_scale(1.0, "a")
    assert np.array_equal(pipeline(PROMPT, **options).frames, whole)


def test_a_change_is_recorded_and_no_command_repeats_it(model, style):
    pipeline = VideoPipeline(model)
    pipeline.load_lora(style)

    def show(frames: int, *_: object) -> None:
        if frames >= 3:
            pipeline.set_lora_scale(0.25)

    metadata = pipeline(PROMPT, num_frames=9, order="stream", on_progress=show).metadata
    assert metadata["lora"][0]["scale"] == 1.0 and "command" not in metadata
    assert [change["scales"] for change in metadata["lora_changes"]] == [{"style": 0.25}]
    assert metadata["lora_changes"][0]["block"] >= 1


def test_names(model, style):
    pipeline = VideoPipeline(model)
    line = refusals.refusal(pipeline.set_lora_scale, 1.0)
    assert line.startswith("name must be that of a loaded LoRA (none; load_lora adds one")
    pipeline.load_lora(style)
    assert "name 'style' is taken by" in refusals.refusal(pipeline.load_lora, style)
    pipeline.load_lora(style, -1.0, name="minus")
    assert refusals.refusal(pipeline.set_lora_scale, 1.0).endswith("LoRA (style, minus), got None")
    assert "scale must be a finite number" in refusals.refusal(pipeline.set_lora_scale, float("nan"), "style")
    together = pipeline(PROMPT, num_frames=6)  # 1 and -1 of the same
    difference = np.abs(together.frames.astype(int) - VideoPipeline(model)(PROMPT, num_frames=6).frames)
    assert difference.max() <= 1


def test_a_session_belongs_to_its_adapters(model, style):
    pipeline = VideoPipeline(model)
    pipeline.load_lora(style)
    from hiar_model.pipelines.video_pipeline import VideoOptions

    run = pipeline.prepare(VideoOptions(PROMPT, num_frames=6, order="stream", open_end=True))
    list(run)
    run.save_session("s.safetensors")
    options = {"num_frames": 9, "order": "stream", "session": "s.safetensors", "open_end": True}
    assert len(pipeline(PROMPT, **options).frames) == 3
    pipeline.set_lora_scale(0.5)
    assert "is of another run: lora was" in refusals.refusal(lambda: pipeline(PROMPT, **options))


def test_generate_records_and_repeats(folder, style, capsys):
    other = lora_files.write(Path("adapters"), "native", load_video_model(folder, "cpu").transformer.state_dict(),
                             {"blocks.0.self_attn.o": (2, 2.0)}, name="other")  # fmt: skip
    words = ["generate", PROMPT, "--model", str(folder), "--num-frames", "6", "-o"]
    assert main([*words, "plain.mp4"]) == 0
    assert main([*words, "a.mp4", "--lora", f"{style}:0.5", "--lora", str(other)]) == 0
    assert "kohya keys: 3 layers of rank 2; merged at scale 0.5" in capsys.readouterr().err
    assert [(lora["name"], lora["scale"]) for lora in read("a.mp4.json")["lora"]] == [("style", 0.5), ("other", 1.0)]
    assert main(["generate", "--config", "a.mp4.json", "-o", "b.mp4"]) == 0
    a, b, plain = (Path(f"{name}.mp4").read_bytes() for name in ("a", "b", "plain"))
    assert a == b != plain
    assert main(["generate", "--config", "a.mp4.json", "-o", "c.mp4", "--lora", f"{style}:0.5"]) == 0  # typed: alone
    assert [lora["name"] for lora in read("c.mp4.json")["lora"]] == ["style"]
    Path("c.yaml").write_text(f"prompt: {PROMPT}\nmodel: {folder}\nnum_frames: 6\nlora: ['{style}:0.5', '{other}']\n")
    assert main(["generate", "--config", "c.yaml", "-o", "d.mp4"]) == 0
    assert Path("d.mp4").read_bytes() == a
    capsys.readouterr()
    style.write_bytes(other.read_bytes())
    assert main(["generate", "--config", "a.mp4.json", "-o", "e.mp4"]) == 0
    told = capsys.readouterr().err
    assert "a.mp4.json: made by LoRA style" in told and "made by LoRA other" not in told


def test_compare_takes_it(folder, style):
    words = ["compare", PROMPT, "--model", str(folder), "--num-frames", "6", "-o", "c.mp4", "--lora", f"{style}:2"]
    assert main(words) == 0
    assert read("c.mp4.json")["lora"][0]["scale"] == 2.0
    assert "--lora ./adapters/style.safetensors:2" in read("c.mp4.json")["command"]  # so that the folder can be moved


@pytest.mark.parametrize(
    ("lora", "line"),
    [(":0.5", "--lora :0.5: no file before the ':'"),
     ("missing.safetensors:2", "--lora missing.safetensors: no such file; expected FILE or FILE:SCALE"),
     ("x.safetensors:big", "--lora x.safetensors:big: the scale must be a number, got 'big'")],
)  # fmt: skip
def test_a_typed_mistake_is_one_line(folder, capsys, lora, line):
    Path("x.safetensors").touch()
    assert main(["generate", PROMPT, "--model", str(folder), "-o", "a.mp4", "--lora", lora]) == 2
    assert capsys.readouterr().err == f"hiar: {line}\n" and not Path("a.mp4").exists()


def test_an_output_that_would_replace_the_adapter(folder, style, capsys):
    Path("a.mp4").write_bytes(style.read_bytes())
    words = ["generate", PROMPT, "--model", str(folder), "-o", "a.mp4", "--overwrite", "--lora", "a.mp4:0.5"]
    assert main(words) == 2
    assert "-o would replace a.mp4, which --lora a.mp4 reads" in capsys.readouterr().err


def test_wan_experts_take_it_too(here):
    folder = wan_files.write_original(here / "wan")
    second = wan_files.write_training(here / "low.pt", {"generator": 1})
    file = lora_files.write(here, "diffusers", wan_files.native_state(), {"blocks.0.self_attn.q": (2, 4.0)})
    notes: list[str] = []
    mapping = {"0-1": f"{folder}/diffusion_pytorch_model.safetensors", "2-3": str(second)}
    options = {"checkpoint": mapping, "dtype": "float32", "lora": f"{file}:0.5"}
    model = load_video_model(folder, "cpu", on_checkpoint=notes.append, **options)
    assert len([note for note in notes if "merged at scale 0.5" in note]) == 1 and model.loras[0].scale == 0.5
    for step, seed in ((0, 0), (3, 1)):
        state = wan_files.native_state(seed=seed)
        want = lora_files.expected(state, 0.5, {"blocks.0.self_attn.q": (2, 4.0)})["blocks.0.self_attn.q.weight"]
        got = model.experts[step].state_dict()["blocks.0.self_attn.q.weight"]
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("experts", [False, True])
def test_one_that_is_given_twice_is_recorded_twice(here, experts):
    """It is merged twice; a record with one of them repeats another video."""
    folder = wan_files.write_original(here / "wan", parts=True)
    file = lora_files.write(here, "diffusers", wan_files.native_state(), {"blocks.0.self_attn.q": (2, 4.0)})
    weights = str(folder / "diffusion_pytorch_model.safetensors")
    checkpoint = {"0-1": weights, "2-3": str(wan_files.write_training(here / "low.pt"))} if experts else None
    notes: list[str] = []
    options = {"checkpoint": checkpoint, "dtype": "float32", "lora": [file, file]}
    model = load_video_model(folder, "cpu", on_checkpoint=notes.append, **options)
    assert [lora.name for lora in model.loras] == ["style", "style"]
    assert len([note for note in notes if "merged at scale 1" in note]) == 2
    state = wan_files.native_state()
    want = lora_files.expected(state, 2.0, {"blocks.0.self_attn.q": (2, 4.0)})["blocks.0.self_attn.q.weight"]
    got = model.transformer.state_dict()["blocks.0.self_attn.q.weight"]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-6)
