"""`hiar convert`: every layout into every other; a hash of all tensors proves it, and nothing half done is left."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import refusals
import torch
import wan_files
from safetensors.torch import load_file, save_file
from small_toy import small_folder  # noqa: F401 (fixture)
from wan_files import WAN

from hiar_model import load_video_model
from hiar_model.cli import main
from hiar_model.models import convert as module
from hiar_model.models import registry
from hiar_model.models.checkpoint import load_transformer, read_checkpoint, save_transformer
from hiar_model.models.convert import TARGETS, convert, tensors_sha256
from hiar_model.models.transformer import HiARTransformer

pytestmark = pytest.mark.cpu

refusal = partial(refusals.refusal, convert)

NAMES = {"native": "folder", "diffusers": "folder", "pt": "w.pt"}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    save_transformer(wan_files.transformer(), root / "ours.safetensors")
    torch.save(wan_files.native_state(), root / "wan.pth")
    return {
        "original": wan_files.write_original(root / "Wan2.1-T2V-1.3B", 3, parts=False),
        "diffusers": wan_files.write_diffusers(root / "Wan2.1-T2V-1.3B-Diffusers", 3, parts=False),
        "training": wan_files.write_training(root / "hiar.pt", None, "model._fsdp_wrapped_module.{}".format),
        "ours": root / "ours.safetensors",
        "pth": root / "wan.pth",
    }


# The round trip


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("source", ["original", "diffusers", "training", "ours", "pth"])
def test_every_layout_into_every_other(published, tmp_path, source, to):
    want = tensors_sha256(wan_files.native_state())
    messages = []
    done = convert(published[source], tmp_path / NAMES[to], to, on_checkpoint=lambda *seen: messages.append(seen))
    assert messages == [(done.source, want)] and done.sha256 == want
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[to]]
    state, actual = read_checkpoint(tmp_path / NAMES[to])
    assert tensors_sha256(state) == want and actual == done.target and actual.config == WAN
    assert all(torch.equal(state[key], value) for key, value in wan_files.native_state().items())
    back = convert(tmp_path / NAMES[to], tmp_path / "back.safetensors", "native")
    assert back.sha256 == want and back.target.config == WAN


def test_dtypes_stay_and_odd_sizes_too(tmp_path):
    config = dataclasses.replace(WAN, num_heads=4, eps=1e-5, text_len=9, rope_theta=500.0)
    model = HiARTransformer(config).to(torch.bfloat16)
    model.head.float()
    save_transformer(model, tmp_path / "a.safetensors")
    hashes = set()
    for source, target, to in (
        ("a.safetensors", "b", "native"),
        ("b", "c.pt", "pt"),
        ("c.pt", "d.safetensors", "native"),
    ):
        done = convert(tmp_path / source, tmp_path / target, to)
        hashes.add(done.sha256)
        assert done.target.config == config and done.target.dtypes == (torch.bfloat16, torch.float32)
    assert len(hashes) == 1


def test_diffusers_loads_what_is_written(published, tmp_path):
    """As from_pretrained does it, which itself asks for a package more (accelerate)."""
    from diffusers import WanTransformer3DModel

    convert(published["training"], tmp_path / "transformer", "diffusers")
    config = WanTransformer3DModel.load_config(tmp_path / "transformer")
    theirs, want = WanTransformer3DModel.from_config(config), wan_files.diffusers_transformer()
    theirs.load_state_dict(load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), want.state_dict().values()))
    assert plain(theirs.config) == {**plain(want.config), "patch_size": list(want.config.patch_size)}


def plain(config: dict[str, object]) -> dict[str, object]:
    """Without what says who wrote it."""
    return {key: value for key, value in config.items() if key[0] != "_"}


def test_a_training_file_as_the_published_code_reads_it(published, tmp_path):
    convert(published["original"], tmp_path / "w.pt", "pt")
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    assert content["generator"].keys() == {f"model.{key}" for key in wan_files.native_state()}


def test_a_native_folder_as_published(published, tmp_path):
    convert(published["diffusers"], tmp_path / "Wan2.1", "native")
    folders = (tmp_path / "Wan2.1", published["original"])
    config, want = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert config["_class_name"] == want["_class_name"] and {key: config[key] for key in plain(want)} == plain(want)
    written = load_file(tmp_path / "Wan2.1" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == wan_files.native_state().keys()


# The hash


def test_the_hash_by_hand():
    state = {"b": torch.tensor([[1.5, -2.0]]), "a": torch.tensor([3.0], dtype=torch.bfloat16)}
    text_and_bytes = (
        b"a bfloat16 [1]\n" + bytes.fromhex("4040") + b"b float32 [1, 2]\n" + bytes.fromhex("0000c03f000000c0")
    )
    assert tensors_sha256(state) == hashlib.sha256(text_and_bytes).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update({"head.modulation": state["head.modulation"].flip(-1)}),
        lambda state: state.update({"head.modulation": state["head.modulation"].double()}),
        lambda state: state.update({"head.modulation": state["head.modulation"].flatten()}),
        lambda state: state.update({"head.modulation2": state.pop("head.modulation")}),
        lambda state: state.pop("head.modulation"),
    ],
)
def test_the_hash_sees_everything(change):
    state = wan_files.native_state()
    before = tensors_sha256(state)
    assert tensors_sha256(dict(reversed(state.items()))) == before
    assert (
        tensors_sha256({key: value.t().contiguous().t() if value.dim() == 2 else value for key, value in state.items()})
        == before
    )
    change(state)
    assert tensors_sha256(state) != before


# Nothing half done


def test_a_lossy_write_is_not_kept(published, tmp_path, monkeypatch):
    def lossy(state, path, metadata):
        save_file({**state, "proj_out.weight": state["proj_out.weight"] * 1.0001}, path, metadata)

    monkeypatch.setattr(module, "save_tensors", lossy)
    line = refusal(published["original"], tmp_path / "out", "diffusers")
    assert line.startswith(f"{tmp_path / 'out'} is not written: its tensors hash to ")
    assert not list(tmp_path.iterdir())


def test_other_sizes_are_not_kept(published, tmp_path, monkeypatch):
    monkeypatch.setattr(module.key_mapping, "native_config", lambda config, window: {**config.to_dict(), "eps": 0.5})
    line = refusal(published["original"], tmp_path / "out", "native")
    assert line == f"{tmp_path / 'out'} is not written: it says eps 0.5, {published['original']} says 1e-06"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "writer"), [("native", "save_file"), ("diffusers", "save_file"), ("pt", "torch.save")])
def test_a_full_disk_leaves_nothing(published, tmp_path, monkeypatch, to, writer):
    def full(state, path, *rest):
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file\nmore lines")

    if writer == "save_file":
        monkeypatch.setattr(module, "save_tensors", full)
    else:
        monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError) as refused:
        convert(published["original"], tmp_path / NAMES[to], to)
    assert str(refused.value) == f"cannot write {tmp_path / NAMES[to]}: PytorchStreamWriter failed writing file"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "name", "free"),
    [("pt", "g.pt", "g-2.pt"), ("native", "w.safetensors", "w-2.safetensors"), ("diffusers", "Wan2.1", "Wan2.1-2")],
)
def test_a_target_that_another_process_writes_meanwhile_stays(published, tmp_path, capsys, monkeypatch, to, name, free):
    target, write = tmp_path / name, module._write

    def meanwhile(state, info, partial, to):
        write(state, info, partial, to)
        other = target / "config.json" if to == "diffusers" else target
        other.parent.mkdir(exist_ok=True)
        other.write_text("another's")

    monkeypatch.setattr(module, "_write", meanwhile)
    assert main(["convert", str(published["original"]), str(target), "--to", to]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"{target} was written by another process meanwhile: this result is {tmp_path / free}\n"
    file = target / "config.json" if to == "diffusers" else target
    assert str(tmp_path / free) in printed.out and file.read_text() == "another's"
    assert load_transformer(tmp_path / free).config == WAN
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, free])


# What is refused


def test_bad_targets(published, tmp_path):
    source = published["original"]
    assert refusal(source, tmp_path / "x", "gguf") == "unknown layout 'gguf'; legal: native, diffusers, pt"
    assert refusal(source, tmp_path / "x.pt", "native").endswith("--to native writes a folder or name.safetensors")
    assert refusal(source, tmp_path / "x.bin", "native").endswith("--to native writes a folder or name.safetensors")
    assert refusal(source, tmp_path / "x.safetensors", "diffusers").endswith("--to diffusers writes a folder")
    assert refusal(source, tmp_path / "x", "pt").endswith("--to pt writes name.pt or name.pth")
    assert refusal(source, tmp_path / "no" / "x", "native").endswith(f"{tmp_path / 'no'} is no folder; make it first")
    for name in ("there", "there.pt"):
        (tmp_path / name).mkdir() if name == "there" else (tmp_path / name).write_text("mine")
    (tmp_path / "there" / "mine").write_text("mine")
    for name, to in (("there", "native"), ("there", "diffusers"), ("there.pt", "pt")):
        assert (
            refusal(source, tmp_path / name, to)
            == f"{tmp_path / name} exists and is not overwritten; choose another name"
        )
    assert (tmp_path / "there" / "mine").read_text() == (tmp_path / "there.pt").read_text() == "mine"
    assert refusal(source, source, "diffusers").startswith(f"{source} exists and is not overwritten")


def test_a_target_in_the_source(published, here):
    """Its file stood beside the old weights from then on, and no command could read the folder."""
    assert convert(published["training"], here / "model", "native").target.layout == "native"
    before = sorted(here.rglob("*"))
    for target in ("model/new", "model/new.safetensors", "model/../model/a"):
        line = refusal("model", here / target, "native")
        assert line == f"{here / target} would lie in model and become part of it: choose a place outside"
    assert "scenes is the name of a shipped model, which --model scenes means" in refusal("model", "scenes", "native")
    assert sorted(here.rglob("*")) == before


def test_a_file_beside_a_toy(folder, here):
    """It was read as the toy's own: "no weights found"."""
    shutil.copytree(folder, here / "toy2")
    line = refusal(folder, here / "toy2/x.safetensors", "native")
    assert line.endswith(f"x.safetensors: {here / 'toy2'} is the folder of a toy model: choose a place outside")
    convert(folder, here / "x.safetensors", "native")
    (here / "x.safetensors").rename(here / "toy2/x.safetensors")
    assert load_transformer(here / "toy2/x.safetensors").config == load_transformer(folder).config


def test_an_empty_folder_is_taken(published, tmp_path):
    (tmp_path / "Wan2.1-new").mkdir()  # .1-new is no suffix of a file
    assert convert(published["training"], tmp_path / "Wan2.1-new", "diffusers").target.layout == "diffusers"


def test_bad_sources(published, tmp_path):
    missing = tmp_path / "no.pt"
    assert refusal(missing, tmp_path / "x", "native") == f"{missing}: no such file or folder"
    odd = tmp_path / "odd.safetensors"
    save_transformer(HiARTransformer(dataclasses.replace(WAN, text_len=9)), odd)
    line = f"{odd}: diffusers' layout has no text_len: it means 512, the model has 9"
    assert refusal(odd, tmp_path / "x", "diffusers") == line
    assert [path.name for path in tmp_path.iterdir()] == ["odd.safetensors"]


# The command


def test_the_command(published, tmp_path, capsys):
    target = tmp_path / "transformer"
    assert main(["convert", str(published["training"]), str(target), "--to", "diffusers"]) == 0
    messages = capsys.readouterr().out.splitlines()
    sha256 = tensors_sha256(wan_files.native_state())
    assert messages[0].startswith(
        "in:  training layout, network generator_ema (left: generator, critic): 2 layers of width"
    )
    assert messages[2].startswith(
        "out: diffusers layout: 2 layers of width 256, 2 heads; 1,734,656 parameters in 69 tensors"
    )
    assert messages[2].endswith(f"GB in {target / 'diffusion_pytorch_model.safetensors'}")
    assert [line.strip() for line in messages[1::2]] == [
        f"tensors sha256 {sha256}",
        f"tensors sha256 {sha256}: read again, the same",
    ]
    assert load_transformer(target).config == WAN
    assert main(["convert", str(published["training"]), str(target), "--to", "diffusers"]) == 2
    assert capsys.readouterr().err == f"hiar: {target} exists and is not overwritten; choose another name\n"
    assert main(["convert", str(published["training"]), str(tmp_path / "y")]) == 2
    assert "to" in capsys.readouterr().err


def test_the_toy_and_its_folder_are_sources_too(here, capsys):
    """Its folder holds a codec as well; what is converted is its transformer."""
    folder = registry.model_folder("toy")
    own = load_video_model("toy", "cpu").transformer.state_dict()
    for name, source in {"name": "toy", "folder": folder, "file": folder / "model.safetensors"}.items():
        actual = load_transformer(source, dtype=torch.float32)
        assert actual.config.position_grid == (4, 4)
        assert all(torch.equal(value, own[key]) for key, value in actual.state_dict().items())
        for to, suffix in (("native", ""), ("native", ".safetensors"), ("pt", ".pt")):
            target = f"{name}-{to}{suffix}"
            assert main(["convert", str(source), target, "--to", to]) == 0
            again = load_transformer(target, dtype=torch.float32)
            assert again.config == actual.config
            assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())
    capsys.readouterr()
    assert main(["convert", "toy", "diffusers", "--to", "diffusers"]) == 2
    assert "position_grid" in capsys.readouterr().err
