"""Published layouts: the same network from each, equal to diffusers'; what is no such network is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import refusals
import torch
import torch.nn.functional as F
import wan_files
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_files import WAN

from hiar_model.config import WanConfig
from hiar_model.config.rollout import TrainedWindow
from hiar_model.models import key_mapping
from hiar_model.models.checkpoint import CheckpointInfo, load_transformer, read_checkpoint

pytestmark = pytest.mark.cpu

refusal = partial(refusals.refusal, load_transformer)

LAYOUTS = ("original", "original, 3 shards", "diffusers", "diffusers, shards", "training")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    """The same weights in every layout."""
    root = tmp_path_factory.mktemp("published")
    return {
        "original": wan_files.write_original(root / "Wan2.1-T2V-1.3B", parts=False),
        "original, 3 shards": wan_files.write_original(root / "Wan2.1-T2V-14B", 3, parts=False),
        "diffusers": wan_files.write_diffusers(root / "Wan2.1-T2V-1.3B-Diffusers", parts=False),
        "diffusers, shards": wan_files.write_diffusers(root / "Wan2.1-T2V-14B-Diffusers", 3, parts=False),
        "training": wan_files.write_training(root / "hiar.pt"),
    }


def spoil(published: dict[str, Path], tmp_path: Path, change) -> Path:
    """A diffusers transformer folder whose tensors `change` has edited."""
    folder = tmp_path / "transformer"
    shutil.copytree(published["diffusers"] / "transformer", folder)
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    change(state)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder


# The map


def test_the_map_is_diffusers_own_and_leads_back():
    ours, theirs = wan_files.native_state(), wan_files.diffusers_transformer().state_dict()
    assert {key_mapping.to_diffusers(key) for key in ours} == set(theirs)
    for key, value in ours.items():
        assert torch.equal(theirs[key_mapping.to_diffusers(key)], value), key
        assert key_mapping.to_native(key_mapping.to_diffusers(key)) == key
    assert key_mapping.is_diffusers(theirs) and not key_mapping.is_diffusers(ours)
    for other in ("position_embedding", "blocks.0.extra.weight", "extra", ""):  # not ours to rename
        assert key_mapping.to_diffusers(other) == other == key_mapping.to_native(other)


def test_the_text_encoders_map_leads_back():
    theirs = [key for key in wan_files.text_encoder().state_dict() if key != "shared.weight"]
    ours = wan_files.original_text_encoder_state()
    assert sorted(map(key_mapping.text_to_transformers, ours)) == sorted(theirs)
    assert sorted(map(key_mapping.text_to_native, theirs)) == sorted(ours)
    for other in ("shared.weight", "lm_head.weight", "blocks.0.extra.weight", "extra", "encoder.block.0.extra.weight"):
        assert key_mapping.text_to_transformers(other) == other == key_mapping.text_to_native(other)


@pytest.mark.parametrize("changes", [{}, {"eps": 1e-5, "patch_size": (1, 1, 2), "text_dim": 8, "out_channels": 3}])
def test_sizes_survive_both_config_files(changes):
    config = dataclasses.replace(WAN, **changes)
    here = Path("config.json")
    for written in (key_mapping.native_config(config), key_mapping.diffusers_config(config), config.to_dict()):
        sizes = key_mapping.read_sizes(json.loads(json.dumps(written)), here)
        assert WanConfig.from_dict(sizes) == config
    odd = dataclasses.replace(config, rope_theta=20000.0, text_len=9, position_grid=(2, 3))
    assert WanConfig.from_dict(key_mapping.read_sizes(key_mapping.native_config(odd), here)) == odd
    for name in ("rope_theta", "text_len", "position_grid"):
        one = dataclasses.replace(config, **{name: getattr(odd, name)})
        with pytest.raises(ValueError, match=f"diffusers' layout has no {name}: it means .*, the model has "):
            key_mapping.diffusers_config(one)


@pytest.mark.parametrize("window", [TrainedWindow(), TrainedWindow(12, 3), TrainedWindow(None, 3), TrainedWindow(9, 0)])
def test_a_window_survives_the_config_file(window):
    here, written = Path("config.json"), json.loads(json.dumps(key_mapping.native_config(WAN, window)))
    assert key_mapping.read_window(written, here) == window
    assert WanConfig.from_dict(key_mapping.read_sizes(written, here)) == WAN


# Loading


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_network(published, layout):
    messages: list[CheckpointInfo] = []
    model = load_transformer(published[layout], on_checkpoint=messages.append)
    assert model.config == WAN
    state = model.state_dict()
    for key, value in wan_files.native_state().items():
        assert torch.equal(state[key], value), key
    (info,) = messages
    files = {"original": 1, "original, 3 shards": 3, "diffusers": 1, "diffusers, shards": 4, "training": 1}
    assert len(info.files) == files[layout] and all(file.is_file() for file in info.files)
    assert info.parameters == sum(p.numel() for p in model.parameters()) and info.tensors == len(state)
    assert info.nbytes == 4 * info.parameters and info.dtypes == (torch.float32,)
    name = {"original": "native", "diffusers": "diffusers", "training": "training"}[layout.partition(",")[0]]
    taken = "generator_ema (left: generator, critic)" if name == "training" else None
    start = f"{name} layout" + (f", network {taken}" if taken else "") + ": 2 layers of width 256, 2 heads; "
    assert str(info).startswith(start) and "1,734,656 parameters in 69 tensors, float32, 0.01 GB in" in str(info)
    assert str(info).endswith(" and 3 more") == (layout == "diffusers, shards")


def test_what_was_found_counts_mixed_dtypes(tmp_path):
    folder = wan_files.write_original(tmp_path, parts=False, dtype=torch.bfloat16)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({**state, "head.modulation": state["head.modulation"].float()}, file)
    saved, info = read_checkpoint(folder)
    assert info.dtypes == (torch.bfloat16, torch.float32) and "bfloat16 and float32" in str(info)
    assert saved["head.modulation"].dtype == torch.float32 and saved["head.head.weight"].dtype == torch.bfloat16
    assert info.nbytes == sum(value.nbytes for value in saved.values())
    wide = {key: value.float() for key, value in state.items()}
    save_file({**wide, "head.modulation": state["head.modulation"]}, file)
    assert read_checkpoint(folder)[1].dtypes == (torch.float32, torch.bfloat16), "the most frequent first"


def test_inner_folders_and_single_files_of_a_pipeline(published):
    for inside in ("transformer", "transformer/diffusion_pytorch_model.safetensors"):
        _, info = read_checkpoint(published["diffusers"] / inside)
        assert (info.layout, info.config) == ("diffusers", WAN)
    index = published["diffusers, shards"] / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert len(read_checkpoint(index)[1].files) == 4


@pytest.mark.parametrize("wrapper", ["module.", "model.diffusion_model.", "_orig_mod.module.model."])
def test_more_wrappers(tmp_path, wrapper):
    path = wan_files.write_training(tmp_path / "w.pt", {"generator": 0}, lambda key: wrapper + key)
    state, info = read_checkpoint(path)
    assert state.keys() == wan_files.native_state().keys() and (info.network, info.others) == ("generator", ())


def test_diffusers_keys_behind_wrappers(tmp_path):
    state = {f"model.{key}": value for key, value in wan_files.diffusers_transformer().state_dict().items()}
    torch.save({"generator": state}, tmp_path / "w.pt")
    assert read_checkpoint(tmp_path / "w.pt")[0].keys() == wan_files.native_state().keys()


# Parity with diffusers' WanTransformer3DModel


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """latents [2, 3, 16, 8, 12], a prompt of 7 tokens, and the 512 that diffusers is given of it."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 3, 16, 8, 12, generator=generator)
    text = torch.randn(2, 7, WAN.text_dim, generator=generator)
    return latents, text, F.pad(text, (0, 0, 0, WAN.text_len - text.shape[1]))


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference."""
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_parity_with_diffusers(published, inputs, layout):
    latents, text, padded = inputs
    model, theirs = load_transformer(published[layout]), wan_files.diffusers_transformer()
    for t, bound in ((1000.0, 1e-4), (625.0, 1e-4), (0.0, 1e-5)):  # its sinusoid of t is float32
        steps = torch.full((2,), t)
        with torch.no_grad():
            want = theirs(latents.transpose(1, 2), steps, padded).sample.transpose(1, 2)
            assert error(model(latents, steps, text), want) <= bound, t
            assert error(model(latents, steps, padded), want) <= bound, t
            assert error(model(latents, steps, text[:, :2]), want) > 10 * bound  # every token tells
            bare = theirs(latents.transpose(1, 2), steps, text).sample.transpose(1, 2)
            assert error(model(latents, steps, text), bare) > 0.01  # and so does the padding


def test_the_sinusoid_is_all_of_the_difference(published, inputs):
    """With a float64 sinusoid on their side too, t = 1000 agrees as t = 0 does; a time for each frame likewise."""
    latents, text, padded = inputs
    model, theirs = load_transformer(published["original"]), wan_files.diffusers_transformer()

    def exact(t: Tensor) -> Tensor:
        half = WAN.freq_dim // 2
        angles = t.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        return torch.cat([angles.cos(), angles.sin()], -1).float()

    frame_tokens = 4 * 6
    for steps in (torch.full((2, 3), 1000.0), torch.tensor([[0.0, 1000.0, 500.0], [937.5, 625.0, 0.0]])):
        hook = theirs.condition_embedder.timesteps_proj.register_forward_hook(lambda _, args, out: exact(args[0]))
        with torch.no_grad():
            want = theirs(latents.transpose(1, 2), steps.repeat_interleave(frame_tokens, 1), padded).sample
            hook.remove()
            assert error(model(latents, steps, text), want.transpose(1, 2)) <= 1e-5


# What is refused


def test_wrong_keys_are_told_in_the_files_own_names(published, tmp_path):
    gone = "blocks.1.attn2.to_out.0.bias"
    folder = spoil(published, tmp_path, lambda state: state.pop(gone))
    assert refusal(folder) == f"{folder}: 1 missing key ({gone})"
    (tmp_path / "b").mkdir()
    folder = spoil(published, tmp_path / "b", lambda state: state.update({"blocks.0.attn1.extra": torch.zeros(1)}))
    assert refusal(folder) == f"{folder}: 1 unexpected key (blocks.0.attn1.extra)"
    (tmp_path / "c").mkdir()
    key = "blocks.0.ffn.net.0.proj.bias"
    folder = spoil(published, tmp_path / "c", lambda state: state.update({key: torch.zeros(3)}))
    assert refusal(folder) == f"{folder}: wrong shape: {key} is [3], expected [96]"


def test_a_tensor_in_both_layouts_at_once(published, tmp_path):
    folder = spoil(published, tmp_path, lambda state: state.update({"head.head.bias": state["proj_out.bias"].clone()}))
    assert "is there twice (as head.head.bias); expected every tensor once" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("img_emb.proj.0.weight", "an image-to-video model"),
        ("blocks.0.cross_attn.k_img.weight", "an image-to-video model"),
        ("condition_embedder.image_embedder.norm1.weight", "an image-to-video model"),
        ("blocks.0.attn2.add_k_proj.weight", "an image-to-video model"),
        ("vace_blocks.0.before_proj.weight", "a VACE model"),
        ("face_adapter.fuser_blocks.0.linear2.weight", "a Wan-Animate model"),
        ("blocks.0.self_attn.q.lora_A.weight", "a LoRA adapter"),
        ("blocks.0.attn1.to_qkv.weight", "diffusers' layout with fused projections"),
    ],
)
def test_other_models_are_named(tmp_path, key, what):
    path = tmp_path / "w.safetensors"
    save_file({**wan_files.native_state(), key: torch.zeros(2)}, path)
    assert refusal(path, WAN).startswith(f"{path}: {key} makes it {what}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanVACETransformer3DModel"}, "describes a WanVACETransformer3DModel, expected a WanTransf"),
        ({"image_dim": 1280}, "image_dim 1280 makes it an image-to-video model; expected null"),
        ({"added_kv_proj_dim": 256}, "added_kv_proj_dim 256 makes it an image-to-video model; expected null"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len 514 makes it an image-to-video model; expected null"),
        ({"num_attention_heads": "2"}, "sizes must be numbers: num_attention_heads is '2'"),
        (
            {"attention_head_dim": None, "num_attention_heads": 3},
            "dim must be num_heads (3) times an even number, got 256",
        ),
        ({"depth": 3}, "unknown depth; known: added_kv_proj_dim, attention_head_dim"),
    ],
)
def test_bad_diffusers_configs(published, tmp_path, change, message):
    folder = spoil(published, tmp_path, lambda state: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    line = refusal(folder)
    assert line.startswith(f"{folder / 'config.json'}: ") and message in line


def test_a_config_of_other_heads_is_used_as_told(published, tmp_path):
    """Shapes do not tell the heads: config.json does, whatever they are."""
    folder = spoil(published, tmp_path, lambda state: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4, "attention_head_dim": 64}))
    assert load_transformer(folder).config == dataclasses.replace(WAN, num_heads=4)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "FluxPipeline"}, "model_index.json: describes a FluxPipeline, expected a WanPipeline"),
        ({"_class_name": "WanPipeline", "transformer": [None, None]}, "no folder transformer"),
        ({"_class_name": "WanPipeline", "transformer": ["diffusers", "X"]}, "no folder transformer"),
        (
            {"_class_name": "WanPipeline", "transformer": ["diffusers", "X"], "transformer_2": ["diffusers", "X"]},
            "holds two experts; give the path of one: ",
        ),
    ],
)
def test_bad_pipeline_folders(tmp_path, index, message):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert message in refusal(tmp_path)


def test_weights_beside_those_of_a_pipeline(tmp_path):
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    line = refusal(tmp_path)
    assert f"the transformer of {tmp_path}" in line and "diffusion_pytorch_model.safetensors" in line


def test_folders_without_a_transformer(tmp_path):
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"")  # published beside it, but no transformer
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"")
    assert (
        ": no weights found; expected *.safetensors.index.json, *.safetensors, *.pth, *.pt, *.bin or *.gguf"
        in refusal(tmp_path)
    )
    wan_files.write_original(tmp_path / "high_noise_model", parts=False)
    assert refusal(tmp_path).endswith("; its folders have some: high_noise_model")
