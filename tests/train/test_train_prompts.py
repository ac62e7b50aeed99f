"""Prompts encoded once for training, and the shipped Wan recipes from a text file of prompts to a student."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import av
import numpy as np
import processes
import pytest
import torch
import wan_files
from refusals import refused
from train_job import losses

from hiar_model.cli import main
from hiar_model.config import wan as wan_config
from hiar_model.models.checkpoint import load_transformer
from hiar_model.models.text_encoder import WanTextEncoder
from hiar_model.models.vae import StreamingDecoder, load_vae
from hiar_model.train.config.reading import load_recipe
from hiar_model.train.data.datasets import PromptData
from hiar_model.train.stages.base import make_stage
from hiar_model.train.stages.sources import Sources

pytestmark = pytest.mark.cpu

PROMPTS = ["a red circle moving right", "the cat", "a blue  square moving up slowly on the green dog", "of", "a dog"]
NEGATIVE = "a circle on a circle"
SHAPE = (6, 16, 4, 4)


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """A model folder as published, and prompts, some lines of them empty."""
    folder = wan_files.write_original(tmp_path_factory.mktemp("files") / "Wan2.1-T2V-1.3B")
    (folder.parent / "prompts.txt").write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:], " "]))
    return folder


def stage(wan: Path, **more):
    overrides = {"prompts": str(wan.parent / "prompts.txt"), "text_encoder": str(wan), "shard_size": 2, **more}
    return make_stage(load_recipe("wan-1.3b/prompts", overrides), torch.device("cpu"))


def bits(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_every_prompt_as_the_encoder_has_it(wan, tmp_path, precision):
    seen = []
    prompts = stage(wan, negative=NEGATIVE, precision=precision)
    assert prompts.produce(tmp_path, 0, 1, lambda *progress: seen.append(progress)) == f"prompts: {tmp_path}"
    assert seen == [(i + 1, 5) for i in range(5)]
    data, encoder = PromptData(tmp_path, SHAPE), WanTextEncoder(wan, dtype=getattr(torch, precision))
    expected = [encoder(prompt) for prompt in (*PROMPTS, NEGATIVE)]
    longest = max(text.shape[1] for text in expected)
    assert len(data) == 5 and len({text.shape[1] for text in expected}) > 2
    for text, stored in zip(expected, [*data.first(9), *data.unconditional()], strict=True):
        assert stored.dtype == text.dtype and stored.shape == (longest, 32)
        assert torch.equal(stored[: text.shape[1]], text[0]) and not stored[text.shape[1] :].any()


def test_processes_share_the_shards(wan, tmp_path):
    reports = [stage(wan).produce(tmp_path / "two", rank, 2, lambda *progress: None) for rank in range(2)]
    assert "other processes" in reports[0] and reports[1] == f"prompts: {tmp_path / 'two'}"
    stage(wan).produce(tmp_path / "one", 0, 1, lambda *progress: None)
    assert bits(tmp_path / "two") == bits(tmp_path / "one") and len(bits(tmp_path / "one")) == 4


def test_the_command_on_two_processes(wan, tmp_path):
    """They do not wait for each other: none has a process group."""
    overrides = [f"prompts={wan.parent / 'prompts.txt'}", f"text_encoder={wan}", "shard_size=1", "scale.threads=1"]
    words = ["-m", "hiar_model", "train", "wan-1.3b/prompts", *overrides, "--nproc", "2", "--device", "cpu"]
    done = processes.run(words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("prompts: runs/wan-1.3b/prompts")
    stage(wan, shard_size=1).produce(tmp_path / "one", 0, 1, lambda *progress: None)
    assert bits(tmp_path / "runs" / "wan-1.3b" / "prompts") == bits(tmp_path / "one")


def test_it_goes_on_where_it_ended(wan, tmp_path, monkeypatch):
    """Complete shards are kept, a damaged one is written again; no stage trains on them until all exist."""
    folder, encoded = tmp_path / "out", []
    stage(wan).produce(folder, 0, 1, lambda *progress: None)
    whole = bits(folder)
    (folder / "shard-00000.safetensors").write_bytes(whole["shard-00000.safetensors"][:-1])
    (folder / "shard-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="unfinished, 2 of 3 shards exist"):
        PromptData(folder, SHAPE)
    encode = WanTextEncoder._encode
    monkeypatch.setattr(WanTextEncoder, "_encode", lambda self, text: encoded.append(text) or encode(self, text))
    stage(wan).produce(folder, 0, 1, lambda *progress: None)
    assert bits(folder) == whole and encoded == [*PROMPTS[:2], "", PROMPTS[4]]


def test_settings_of_somebody_else_say_nothing(wan, tmp_path):
    stage(wan).produce(tmp_path, 0, 1, lambda *progress: None)
    (tmp_path / "settings.json").write_text('{"count": "many"}')
    (tmp_path / "shard-00001.safetensors").unlink()
    assert len(PromptData(tmp_path, SHAPE)) == 3


@pytest.mark.parametrize(
    ("more", "names"), [({"negative": "a"}, "prompts was"), ({"shard_size": 3}, "shard_size was 2, now it is 3")]
)
def test_another_run_in_the_same_folder_is_refused(wan, tmp_path, more, names):
    stage(wan).produce(tmp_path, 0, 1, lambda *progress: None)
    before = bits(tmp_path)
    with pytest.raises(ValueError, match=f"holds prompts made with other settings: .*{names}"):
        stage(wan, **more).produce(tmp_path, 0, 1, lambda *progress: None)
    assert bits(tmp_path) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompts": ""}, "recipe: prompts must be given: a text file, one prompt on each line"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt: no readable text file of prompts"),
        ({"text_encoder": ""}, "recipe: text_encoder must be given"),
        ({"text_encoder": "nowhere"}, "nowhere: no such folder"),
        ({"shard_size": 0}, "shard_size must be .* at least 1, got 0"),
        ({"data.folder": "x"}, "unknown key data"),
    ],
)
def test_refused_in_one_line(wan, more, message):
    with refused(message):
        stage(wan, **more)


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n\n", "no prompts; expected"), (b"\xff", "no readable text file")]
)
def test_files_without_prompts(wan, tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        stage(wan, prompts=str(tmp_path / "p.txt"))


def test_samples_are_decoded_by_the_vae(wan, tmp_path):
    """In its own precision whatever the trainer's is; a folder without a VAE is refused before anything is trained."""
    stage(wan).produce(tmp_path, 0, 1, lambda *progress: None)
    changes = {"data.folder": str(tmp_path), "data.latent_size": [4, 4], "num_latent_frames": SHAPE[0]}
    recipe = load_recipe("wan-1.3b/ode_pairs", {**changes, "data.vae": str(wan)})
    sources = Sources(recipe, torch.device("cpu"))
    assert torch.equal(sources.sample_prompts(2), PromptData(tmp_path, SHAPE).first(5)[:2])
    assert len(sources.sample_prompts(9)) == 5
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    expected = [StreamingDecoder(load_vae(wan)).decode(video) for video in latents.split(1)]
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(sources.decode(latents), np.stack(expected))
    with pytest.raises(ValueError, match="Wan2.1_VAE"):
        Sources(load_recipe("wan-1.3b/ode_pairs", {**changes, "data.vae": str(tmp_path)}), torch.device("cpu"))


def test_the_wan_recipes_one_after_another(wan, here, monkeypatch, capsys):
    """As shipped but for sizes: from prompts and the published folder to a student, by `hiar train`."""
    size = dataclasses.asdict(wan_files.WAN)
    for name in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b"):
        monkeypatch.setitem(wan_config._PRESETS, name, size)
    (here / "checkpoints").mkdir()
    (here / "checkpoints" / wan.name).symlink_to(wan)
    (here / "prompts.txt").write_text("\n".join(PROMPTS))
    small = ["data.latent_size=[4,4]", "num_latent_frames=6", "scale.threads=1"]
    few = [*small, "updates=1", "batch_size=2", "log_every=1", "rollout.window_frames=6"]

    def done(recipe: str, *words: str) -> Path:
        assert main(["train", f"wan-1.3b/{recipe}", *words, "--device", "cpu"]) == 0, capsys.readouterr().err
        return Path("runs/wan-1.3b") / recipe

    done("prompts")
    done("ode_pairs", *small, "count=2")
    done("ode_init", *few, "sample_every=0")
    folder = done("hiar", *few, "sample_every=1")
    sheet = av.open(str(folder / "samples" / "update_00000001.png"))  # 12 latent frames are 45, of which 24 are shown
    assert (sheet.streams.video[0].width, sheet.streams.video[0].height) == (24 * 34 + 2, 2 * 34 + 2)
    assert 0 < float(losses(folder)[-1]["sample_motion"]) < 1
    student = load_transformer(folder / "model" / "student.safetensors")
    before = load_transformer("runs/wan-1.3b/ode_init/model/student.safetensors")
    assert student.config == before.config == wan_files.WAN
    # a rate of 2e-6 moves float32 weights, if barely; the average begins at update 40 and is the weights until then
    assert any(not torch.equal(p, q) for p, q in zip(student.parameters(), before.parameters(), strict=True))
    manifest = json.loads((Path("runs/wan-1.3b/ode_pairs") / "manifest.json").read_text())
    assert manifest["steps"] == 48 and manifest["sigmas"] == pytest.approx([1, 0.96, 8 / 9, 8 / 11, 0])
