"""Checkpoints: every layout that is read, exactly, and one clear line for everything that cannot be."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import refusals
import torch
import wan_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hiar_model.config import WanConfig
from hiar_model.models.checkpoint import load_transformer, read_checkpoint, save_transformer
from hiar_model.models.transformer import HiARTransformer

pytestmark = pytest.mark.cpu

refusal = partial(refusals.refusal, load_transformer)

CONFIG = WanConfig(
    dim=128, ffn_dim=24, num_heads=1, num_layers=2, freq_dim=8, text_dim=6, in_channels=3, out_channels=2
)
PUBLISHED = {  # as it stands beside the published weights, with other numbers
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 128, "eps": 1e-05, "ffn_dim": 24, "freq_dim": 8,
    "in_dim": 3, "model_type": "t2v", "num_heads": 4, "num_layers": 2, "out_dim": 2, "text_len": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {key: value.clone() for key, value in HiARTransformer(CONFIG).state_dict().items()}


def write(path: Path, weights: dict[str, Tensor], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, **options)  # type: ignore[arg-type]
    return path


def shards(weights: dict[str, Tensor], n: int = 3) -> list[dict[str, Tensor]]:
    keys = list(weights)
    return [{key: weights[key] for key in keys[i::n]} for i in range(n)]


def same(model: HiARTransformer, weights: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in weights)


# What is read


def test_save_and_load_are_exact(tmp_path, weights):
    config = dataclasses.replace(CONFIG, num_heads=4, text_len=9, eps=1e-5)  # nothing that shapes could tell
    model = HiARTransformer(config)
    model.load_state_dict(weights)
    path = tmp_path / "model.safetensors"
    save_transformer(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load_file(path).keys() == weights.keys()  # the published keys, no fused ones
    again = load_transformer(path)
    assert again.config == config and same(again, weights)
    assert not again.training and all(p.requires_grad for p in again.parameters())
    assert not any(p.is_meta for p in again.parameters())
    save_transformer(again, path)  # over the file that is mapped
    assert same(again, weights) and same(load_transformer(path), weights)
    with torch.no_grad():
        x, t, text = torch.randn(1, 3, 3, 4, 4), torch.tensor([500.0]), torch.randn(1, 2, 6)
        assert torch.equal(model(x, t, text), again(x, t, text))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
def test_single_files(tmp_path, weights, name):
    path = write(tmp_path / name, weights)
    assert same(load_transformer(path, CONFIG), weights)
    assert same(load_transformer(str(tmp_path), CONFIG), weights)  # the folder of it


def test_pickles_of_before_zip(tmp_path, weights):
    path = write(tmp_path / "old.pth", weights, _use_new_zipfile_serialization=False)
    assert same(load_transformer(path, CONFIG), weights)


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path, weights, index):
    mapping = {}
    for i, shard in enumerate(shards(weights)):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors"
        write(tmp_path / name, shard)
        mapping |= dict.fromkeys(shard, name)
    write(tmp_path / "Wan2.1_VAE.pth", {"decoder": torch.zeros(2)})  # as the published folder has it; not looked at
    if index:
        file = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
        file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapping}))
        write(tmp_path / "other.safetensors", {"other": torch.zeros(1)})  # the index does not name it
        assert same(load_transformer(file, CONFIG), weights)
    assert same(load_transformer(tmp_path, CONFIG), weights)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"model.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"model._fsdp_wrapped_module.{key}".replace(".blocks.1.", ".blocks.1._fsdp_wrapped_module."),
        lambda key: key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."),
    ],
)
@pytest.mark.parametrize("network", [None, "generator", "generator_ema"])
def test_training_checkpoints(tmp_path, weights, network, rename):
    renamed = {rename(key): value for key, value in weights.items()}
    other = {key: value + 1 for key, value in weights.items()}
    content = {
        None: renamed,
        "generator": {"critic": other, "generator": renamed, "generator_ema": {}, "step": 7},
        "generator_ema": {"generator": other, "critic": other, "generator_ema": OrderedDict(renamed)},
    }[network]
    assert same(load_transformer(write(tmp_path / "model.pt", content), CONFIG), weights)


def test_dtype_and_device(tmp_path, weights):
    narrow = {key: value.to(torch.bfloat16) for key, value in weights.items()}
    path = write(tmp_path / "w.safetensors", narrow)
    saved = load_transformer(path, CONFIG)
    assert same(saved, narrow) and {p.dtype for p in saved.parameters()} == {torch.bfloat16}
    wide = load_transformer(path, CONFIG, dtype=torch.float32, device="cpu")
    assert same(wide, {key: value.float() for key, value in narrow.items()})
    assert all(p.is_meta for p in load_transformer(path, CONFIG, device="meta").parameters())
    mixed = {**narrow, "blocks.0.self_attn.k.bias": weights["blocks.0.self_attn.k.bias"]}
    assert {p.dtype for p in load_transformer(write(path, mixed), CONFIG).parameters()} == {torch.float32}


def test_config_by_argument_header_file_and_shapes(tmp_path, weights):
    """In this order; what config.json leaves open comes from the shapes."""
    path = write(tmp_path / "w.safetensors", weights)
    assert load_transformer(path).config == CONFIG  # shapes alone: heads of 128
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    published = dataclasses.replace(CONFIG, num_heads=4, eps=1e-5, text_len=7)
    assert load_transformer(path).config == published == load_transformer(tmp_path).config
    ours = dataclasses.replace(CONFIG, num_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    assert load_transformer(path).config == ours
    config = dataclasses.replace(CONFIG, num_heads=8)
    save_transformer(load_transformer(path, config), path)
    assert load_transformer(path).config == config
    assert load_transformer(path, ours).config == ours


# What is written


def test_nothing_partial_is_left(tmp_path, weights, monkeypatch):
    model = HiARTransformer(CONFIG)
    path = tmp_path / "w.safetensors"
    save_transformer(model, path)
    before = path.read_bytes()

    def torn(state, name, metadata):
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("hiar_model.models.checkpoint.save_tensors", torn)
    with pytest.raises(OSError, match="no space left"):
        save_transformer(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_a_compiled_model_is_written_under_plain_keys(tmp_path, weights):
    model = HiARTransformer(CONFIG)
    model.load_state_dict(weights)
    save_transformer(torch.compile(model, backend="eager"), tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors").keys() == weights.keys()
    with safe_open(tmp_path / "w.safetensors", "pt") as f:
        assert json.loads(f.metadata()["hiar_config"]) == CONFIG.to_dict()


@pytest.mark.parametrize(
    ("name", "message"),
    [("w.pth", "written as .safetensors, got '.pth'"), ("no/w.safetensors", "no is no folder; make it first")],
)
def test_bad_targets_are_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        save_transformer(HiARTransformer(CONFIG), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "beside", [{}, {"epoch": 1, "optimizer": {"state": {}}, "callbacks": {}}], ids=["alone", "beside"]
)
@pytest.mark.parametrize("name", ["state_dict", "model", "module"])
def test_a_state_dict_beside_other_states(tmp_path, name, beside):
    """As of Lightning, whose keys have a prefix too, of DeepSpeed and of scripts."""
    state = wan_files.native_state()
    torch.save({name: {f"model.diffusion_model.{key}": x for key, x in state.items()}, **beside}, tmp_path / "w.pt")
    read, info = read_checkpoint(tmp_path / "w.pt")
    assert info.layout == "native" and all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("content", [{"ema": {"a": 1}}, {"model": {}}, {"model": {"a": 1}, "state_dict": {"b": 1}}])
def test_groups_that_may_mean_anything(tmp_path, content):
    """Not "w.pt:  is a dict, expected a tensor"."""
    torch.save(content, tmp_path / "w.pt")
    legal = "generator_ema, generator, state_dict, model, module"
    with pytest.raises(
        ValueError, match=f"w.pt: holds groups, {', '.join(content)}; expected a state dict, .* {legal}$"
    ):
        load_transformer(tmp_path / "w.pt")


def test_a_config_that_an_editor_of_windows_saved(tmp_path):
    """With a byte order mark before it."""
    folder = wan_files.write_original(tmp_path / "wan", parts=False)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config, encoding="utf-8-sig")
    assert load_transformer(folder).config == wan_files.WAN


# What is refused


@pytest.mark.parametrize("path", [None, 3, b"w.safetensors", ""])
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match="^path must be the path of a file or folder, got"):
        load_transformer(path)


def test_nothing_there(tmp_path, weights):
    missing = tmp_path / "no" / "w.pth"
    assert refusal(missing, CONFIG) == f"{missing}: no such file or folder"
    assert "no weights found; expected *.safetensors.index.json, *.safetensors" in refusal(tmp_path, CONFIG)
    assert "no weights found: it has no tensor" in refusal(write(tmp_path / "empty.pth", {}), CONFIG)
    path = tmp_path / "weights.txt"
    path.write_bytes(b"?")
    assert refusal(path).endswith("expected .safetensors, .pth, .pt, .bin, .gguf or a folder, got '.txt'")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_torn_files(tmp_path, weights, name, keep):
    path = write(tmp_path / name, weights)
    path.write_bytes(path.read_bytes()[:keep])
    line = refusal(path, CONFIG)
    assert line.startswith(f"{path}: corrupt, or not ") and len(line) < len(str(path)) + 250


def test_a_file_under_the_suffix_of_another_format(tmp_path, weights):
    plain, pickled = write(tmp_path / "w.safetensors", weights), write(tmp_path / "v.pth", weights)
    for file, name, words in (
        (plain, "a.pth", r"it begins as \.safetensors files do: rename it"),
        (plain, "a.gguf", r"corrupt, or not GGUF: it begins as \.safetensors files do"),
        (pickled, "b.safetensors", r"corrupt, or not safetensors: it begins as \.pth files do"),
    ):
        path = tmp_path / name
        path.write_bytes(file.read_bytes())
        assert re.search(words, refusal(path, CONFIG))
    (tmp_path / "e.safetensors").touch()
    assert refusal(tmp_path / "e.safetensors", CONFIG).endswith("corrupt, or not safetensors: it is empty")


def test_pickles_that_are_no_state_dict(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps({"x": Path}, protocol=2))  # would run code
    assert "corrupt, or not a plain PyTorch state dict (weights_only): UnpicklingError" in refusal(path)
    assert refusal(write(path, torch.zeros(2))).endswith("holds a Tensor, expected a state dict")  # type: ignore[arg-type]
    write(path, {"model": {"a": torch.zeros(2)}, "optimizer": {}})
    assert refusal(path).endswith("no Wan transformer: no key gives dim, ffn_dim, num_layers; its keys: a")
    write(path, {"net": {"a": torch.zeros(2)}, "optimizer": {}})
    assert ": holds groups, net, optimizer; expected a state dict" in refusal(path)


def test_a_critic_is_not_a_generator(tmp_path, weights):
    path = write(tmp_path / "w.pt", {"critic": weights, "generator": {}, "step": 3})
    assert refusal(path, CONFIG) == f"{path}: holds a critic only, expected generator_ema or generator"


def test_wrong_keys_and_shapes_are_named(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    keys = [key for key in weights if key.startswith("blocks.1.cross_attn.")]
    less = {key: value for key, value in weights.items() if key not in keys}
    line = refusal(write(path, less))
    assert line == f"{path}: {len(keys)} missing keys ({', '.join(keys[:3])}, ...)"
    line = refusal(write(path, {**weights, "blocks.0.extra": torch.zeros(1)}))
    assert line == f"{path}: 1 unexpected key (blocks.0.extra)"
    key = "blocks.0.self_attn.k.weight"
    line = refusal(write(path, {**weights, key: torch.zeros(128, 64), "head.modulation": torch.zeros(3)}))
    assert line == f"{path}: wrong shape: {key} is [128, 64], expected [128, 128]"
    line = refusal(write(path, less), dataclasses.replace(CONFIG, num_layers=1, ffn_dim=25))
    assert "unexpected keys (blocks.1." in line and "; wrong shape: blocks.0.ffn.0.weight is [24, 128], " in line
    stray = {**weights, "blocks.999999999.modulation": torch.zeros(1)}
    assert "missing keys (blocks.2.modulation, " in refusal(write(path, stray))  # no billion layers are built


def test_integers_are_no_weights(tmp_path, weights):
    path = write(tmp_path / "w.pth", {**weights, "head.head.weight": weights["head.head.weight"].to(torch.int32)})
    assert "head.head.weight is torch.int32, expected one of torch.float16" in refusal(path)


def test_a_tensor_twice(tmp_path, weights):
    for name in ("a.safetensors", "b.safetensors"):
        write(tmp_path / name, weights)
    assert "a.safetensors and b.safetensors both hold " in refusal(tmp_path, CONFIG)
    both = {"head.modulation": weights["head.modulation"], "model.head.modulation": weights["head.modulation"].clone()}
    line = refusal(write(tmp_path / "w.pth", both))
    assert line.endswith("model.head.modulation is there twice (as head.modulation); expected every tensor once")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "corrupt, or not JSON"),
        ("[]", "expected a JSON object, got a list"),
        ("{}", "no weights found: expected a weight_map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names the shard gone.safetensors, which is not beside it"),
        ('{"weight_map": {"a": "../w.safetensors"}}', "names the shard ../w.safetensors, which is not beside it"),
    ],
)
def test_bad_indexes(tmp_path, weights, text, message):
    write(tmp_path / "w.safetensors", weights)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "x.safetensors.index.json").write_text(text)
    assert f"{folder / 'x.safetensors.index.json'}: {message}" in refusal(folder, CONFIG)


@pytest.mark.parametrize("shard_is_there", [True, False])
def test_one_file_beside_an_index(tmp_path, weights, shard_is_there):
    """Which of the two saves is the newer one nobody can know; the shards were taken without a word."""
    write(tmp_path / "x.safetensors", weights)
    if shard_is_there:
        write(tmp_path / "x-00001-of-00001.safetensors", weights)
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "x-00001-of-00001.safetensors")}))
    line = refusal(tmp_path, CONFIG)
    assert line.endswith(f"{index} and {tmp_path / 'x.safetensors'}; keep one, or give the path of one"), line
    load_transformer(tmp_path / "x.safetensors", config=CONFIG)


def test_several_indexes(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    assert refusal(tmp_path).endswith(
        "several indexes (a.safetensors.index.json, b.safetensors.index.json); give the path of one"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dim: 3", "corrupt, or not JSON"),
        ('{"dim": 128, "depth": 3}', "unknown depth; known: dim, eps, ffn_dim"),
        ('{"dim": 130, "num_heads": 4}', "dim must be num_heads (4) times an even number, got 130"),
        ('{"num_heads": "four"}', "num_heads must be a whole number, got 'four'"),
        (
            '{"_class_name": "WanVACEModel", "dim": 128}',
            "describes a WanVACEModel, expected WanModel, ",
        ),
    ],
)
def test_bad_configs(tmp_path, weights, text, message):
    (tmp_path / "config.json").write_text(text)
    line = refusal(write(tmp_path / "w.safetensors", weights))
    assert line.startswith(f"{tmp_path / 'config.json'}: ") and message in line


def test_shapes_that_tell_too_little(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    odd = {**weights, "patch_embedding.weight": torch.zeros(100, 3, 1, 2, 2)}
    assert "dim 100 is no multiple of 128: pass config=" in refusal(write(path, odd))
    line = refusal(write(path, {"decoder.conv.weight": torch.zeros(3)}))
    assert line.endswith("no Wan transformer: no key gives dim, ffn_dim, num_layers; its keys: decoder.conv.weight")
