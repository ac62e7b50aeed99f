"""Files that are not what their name promises: pointers in place of weights, two for one role, adapters, the config and
the tokenizer that are published alone.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import small_toy
import torch
import wan_files
from refusals import refusal
from safetensors.torch import load_file, save_file

from hiar_model import load_transformer, load_video_model
from hiar_model.cli import main
from hiar_model.models.checkpoint import read_checkpoint
from hiar_model.models.convert import convert
from hiar_model.models.text_encoder import WanTextEncoder
from hiar_model.models.vae_weights import load_vae
from hiar_model.train.data.datasets import open_tensors
from hiar_model.train.data.prompts import _read as read_prompts
from hiar_model.train.data.shards import read_json

pytestmark = pytest.mark.cpu

SHA = "ab" * 32
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{SHA}\nsize 5676070424\n"
WEIGHTS = f"{wan_files.WEIGHTS}.safetensors"
SIZE = ["--height", "32", "--width", "48", "--num-frames", "9"]
Q = "blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("wan")
    wan_files.write_original(root / "original")
    wan_files.write_diffusers(root / "diffusers")
    small_toy.write_model(root / "small")
    return root


@pytest.fixture
def here(files, tmp_path, monkeypatch) -> Path:
    """Copies, to be damaged; tests run beside them."""
    for name in ("original", "diffusers", "small"):
        shutil.copytree(files / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Pointers

ROLES = {
    "transformer": ("original", WEIGHTS),
    "text encoder": ("original", wan_files.TEXT_ENCODER),
    "VAE": ("original", wan_files.VAE),
    "tokenizer": ("original", f"{wan_files.TOKENIZER}/tokenizer.json"),
    "sizes": ("original", "config.json"),
    "diffusers' transformer": ("diffusers", f"transformer/{WEIGHTS}"),
    "diffusers' text encoder": ("diffusers", "text_encoder/model.safetensors"),
    "diffusers' VAE": ("diffusers", f"vae/{WEIGHTS}"),
    "diffusers' tokenizer": ("diffusers", "tokenizer/tokenizer.json"),
    "the toy": ("small", "model.safetensors"),
}


@pytest.mark.parametrize("command", ["doctor", "generate"])
@pytest.mark.parametrize("role", ROLES)
def test_a_pointer_is_called_one(here, capsys, role, command):
    folder, name = ROLES[role]
    (here / folder / name).write_text(LFS)
    more = {"doctor": [], "generate": [wan_files.PROMPT, "-o", "v.mp4", *(SIZE if folder != "small" else [])]}
    assert main([command, *more[command], "--model", folder]) == 2
    assert f"{name}: a git-lfs pointer, not the file itself; run `git lfs pull` there" in capsys.readouterr().err
    assert not (here / "v.mp4").exists()


@pytest.mark.parametrize(
    ("option", "name"),
    [("image", "i.png"), ("extend", "c.mp4"), ("prompts", "s.txt"), ("from-session", "s.safetensors")],
)
def test_a_pointer_beside_the_model(here, capsys, option, name):
    Path(name).write_text(LFS)
    prompt = [] if option == "prompts" else ["a red circle moving right"]
    words = ["generate", *prompt, "-o", "v.mp4", "--model", "toy", "--order", "stream", f"--{option}", name]
    assert main(words) == 2
    assert f"{name}: a git-lfs pointer" in capsys.readouterr().err


POINTED = {
    "--config": ["generate", "-o", "v.mp4", "--config", "file"], "a recipe": ["train", "file"],
    "a result": ["bench", "--compare", "file", "file"],
    "prompts": ["generate", "-o", "v.mp4", "--prompts", "file", "--order", "stream"],
}  # fmt: skip


@pytest.mark.parametrize("what", POINTED)
def test_a_pointer_in_place_of_text(tmp_path, monkeypatch, capsys, what):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text(LFS)
    assert main(POINTED[what]) == 2
    printed = capsys.readouterr().err
    assert printed == "hiar: file: a git-lfs pointer, not the file itself; run `git lfs pull` there\n"


@pytest.mark.parametrize("read", [open_tensors, read_json, read_prompts])
def test_a_pointer_to_train_from(tmp_path, read):
    file = tmp_path / "file"
    file.write_text(LFS)
    source = str(file) if read is read_prompts else file
    assert refusal(read, source).startswith(f"{file}: a git-lfs pointer")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("version https://hawser.github.com/spec/v1\n", "a git-lfs pointer"),
        ("/annex/objects/MD5-s12--ab\n", "a git-annex pointer"),
        ("\n<!DOCTYPE html><title>Sign in</title>", "a web page"),
        ("<html><body>404", "a web page"),
    ],
)
def test_other_stand_ins(tmp_path, content, what):
    file = tmp_path / "w.safetensors"
    file.write_text(content)
    assert refusal(load_transformer, file).startswith(f"{file}: {what}")


def test_the_doctor_fails_where_a_shipped_model_is_broken(tmp_path, monkeypatch, capsys):
    shutil.copytree(Path(small_toy.__file__).parents[2] / "hiar_model" / "toy" / "weights", tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").write_text(LFS)
    monkeypatch.setattr("hiar_model.models.registry.resources.files", lambda package: tmp_path)
    assert main(["doctor"]) == 2
    assert re.search(r"hiar: the model toy is not usable: .*a git-lfs pointer", capsys.readouterr().err)


# Two files for one role


def doubled(file: Path, other: str) -> Path:
    """Other weights of the same kind beside a file."""
    twin = file.with_name(other)
    if file.suffix == ".safetensors":
        save_file({key: value * 0.5 for key, value in load_file(file).items()}, twin, {"format": "pt"})
    else:
        torch.save(torch.load(file, weights_only=True), twin)
    return twin


@pytest.mark.parametrize(
    ("file", "other", "load"),
    [
        (f"original/{WEIGHTS}", "old.safetensors", load_transformer),
        (f"original/{WEIGHTS}", "hiar.pt", load_transformer),
        (f"diffusers/transformer/{WEIGHTS}", "old.safetensors", load_transformer),
        ("diffusers/text_encoder/model.safetensors", "model.fp16.safetensors", lambda path: WanTextEncoder(path)("a")),
        ("diffusers/text_encoder/model.safetensors", "old.pth", lambda path: WanTextEncoder(path)("a")),
        (f"diffusers/vae/{WEIGHTS}", "old.safetensors", load_vae),
    ],
)
def test_two_files_for_one_role(here, file, other, load):
    first = here / file
    if other.endswith((".pt", ".pth")):
        torch.save(load_file(first), first.with_name(other))
    else:
        doubled(first, other)
    line = refusal(load, here / file.partition("/")[0])
    assert first.name in line and other in line and "keep one" in line


@pytest.mark.parametrize(
    ("name", "load"),
    [(wan_files.VAE, load_vae), (wan_files.TEXT_ENCODER, WanTextEncoder), (WEIGHTS, load_transformer)],
)
def test_a_role_in_both_layouts(here, name, load):
    shutil.copy(here / "original" / name, here / "diffusers" / name)
    line = refusal(load, here / "diffusers")
    assert line.startswith("two files for the ") and str(here / "diffusers" / name) in line


def test_links_into_the_cache_of_a_hub_are_files(here):
    blobs, snapshot = here / "blobs", here / "snapshot"
    blobs.mkdir()
    for i, file in enumerate(p for p in sorted((here / "diffusers").rglob("*")) if p.is_file()):
        shutil.copy(file, blobs / f"{i}")
        link = snapshot / file.relative_to(here / "diffusers")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / f"{i}")
    assert load_transformer(snapshot).config == wan_files.WAN
    assert WanTextEncoder(snapshot)("a").shape[2] == wan_files.WAN.text_dim and load_vae(snapshot).config.z_dim == 16


# Adapters

A, B = torch.ones(4, 256), torch.ones(256, 4)
ADAPTERS = {
    "diffusers": {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": A,
        "transformer.blocks.0.attn1.to_q.lora_B.weight": B,
    },
    "differences before": {f"diffusion_model.{Q}.diff_b": B, f"diffusion_model.{Q}.lora_down.weight": A},
    "kohya": {"lora_unet_blocks_0_self_attn_q.lora_down.weight": A, "lora_unet_blocks_0_self_attn_q.alpha": B},
    "peft": {f"base_model.model.{Q}.lora_A.default.weight": A},
    "LoKr": {"lycoris_blocks_0_self_attn_q.lokr_w1": A, "lycoris_blocks_0_self_attn_q.lokr_w2": B},
    "LoKr of ComfyUI": {f"diffusion_model.{Q}.lokr_w1": A},
    "LoHa": {f"diffusion_model.{Q}.hada_w1_a": A},
    "differences": {f"diffusion_model.{Q}.diff": A, f"diffusion_model.{Q}.diff_b": B},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_called_one(tmp_path, kind):
    file = tmp_path / "w.safetensors"
    save_file({key: value.clone() for key, value in ADAPTERS[kind].items()}, file)
    line = refusal(load_transformer, file)
    what = {"LoKr": "LoKr adapter", "LoHa": "LoHa adapter", "differences": "differences from a checkpoint"}
    assert what.get(kind.partition(" of ")[0], "a LoRA adapter") in line and " first" in line


@pytest.mark.parametrize("name", ["generator_lora", "critic_lora", "lora"])
def test_a_training_file_of_adapters(tmp_path, name):
    file = tmp_path / "w.pt"
    torch.save({name: {f"base_model.model.model.{Q}.lora_A.default.weight": A}, "step": 3000}, file)
    assert (
        refusal(load_transformer, file)
        == f"{file}: {name} makes it a LoRA adapter; give it beside a checkpoint, as --lora, or merge it first, with "
        "hiar convert --lora"
    )


# A causal model's config.json


def causal(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "CausalWanModel", **values}))


@pytest.mark.parametrize(
    ("values", "window", "note"),
    [
        ({"local_attn_size": -1, "sink_size": 0}, (21, 0), "sink 0 latent frames"),
        ({"local_attn_size": 12, "sink_size": 3}, (12, 3), "window 12, sink 3 latent frames"),
        ({"local_attn_size": 9}, (9, 0), "window 9 latent frames"),
        ({"qk_norm": True, "window_size": [-1, -1]}, (21, 0), ""),
    ],
)
def test_the_window_of_a_causal_model(here, capsys, values, window, note):
    causal(here / "original", **values)
    notes: list[str] = []
    model = load_video_model("original", "cpu", on_checkpoint=notes.append)
    assert (model.rollout.window_frames, model.rollout.sink_frames) == window
    assert notes[0].endswith(f"; {note} by its config.json" if note else WEIGHTS)
    assert main(["doctor", "--model", "original", "--height", "32", "--width", "48"]) == 0
    assert f"window {window[0]}," in capsys.readouterr().out


def test_a_converted_causal_model_keeps_its_window(here):
    causal(here / "original", local_attn_size=12, sink_size=3)
    convert(here / "original", here / "again", "native")
    info = read_checkpoint(here / "again")[1]
    assert info.window == (12, 3)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"local_attn_size": 0}, "local_attn_size must be a whole number of at least 1, or -1, got 0"),
        ({"local_attn_size": True}, "local_attn_size must be a whole number of at least 1, or -1, got True"),
        ({"local_attn_size": [12, 9]}, "local_attn_size must be a whole number of at least 1, or -1, got [12, 9]"),
        ({"sink_size": -1}, "sink_size must be a whole number of at least 0, got -1"),
        ({"_class_name": "WanModel", "sink_size": 3}, "unknown sink_size; known: dim, "),
    ],
)
def test_no_window(here, values, line):
    causal(here / "original", **values)
    assert refusal(load_transformer, here / "original").startswith(f"{here / 'original' / 'config.json'}: {line}")


def test_experts_with_two_windows(here):
    shutil.copytree("original", "low")
    causal(here / "low", local_attn_size=12)
    line = refusal(load_video_model, "original", "cpu", checkpoint=f"0-1=original/{WEIGHTS},2-3=low/{WEIGHTS}")
    assert line == (
        f"experts: the config.json of low/{WEIGHTS} says window 12 and sink None, that of original/{WEIGHTS} None and "
        "None; steps share one window"
    )


# spiece.model alone


@pytest.fixture
def spiece(here) -> Path:
    """The tokenizer as google/umt5-xxl has it, without tokenizer.json."""
    import sentencepiece

    folder, model = here / "original" / wan_files.TOKENIZER, io.BytesIO()
    shutil.rmtree(folder)
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle moving right", "the blue square moving up slowly"] * 20), vocab_size=40,
        model_writer=model, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **special}))
    return folder


def test_spiece_alone_is_a_tokenizer(here, spiece):
    import sentencepiece

    ids = WanTextEncoder("original")._tokens("a red circle")[0].tolist()
    assert ids == [*sentencepiece.SentencePieceProcessor(str(spiece / "spiece.model")).encode("a red circle"), 1]
    assert WanTextEncoder("original")("a red circle").isfinite().all()


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_without_what_reads_spiece(here, spiece, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = refusal(WanTextEncoder, "original")
    assert line.startswith(f"the text encoder needs {package} ") and line.endswith("pip install 'hiar-kernels[wan]'")
