"""Weights in 8 bits straight from a file: which bits a layer has, the same video either way, and no full copy."""

from __future__ import annotations

import functools
import itertools
from functools import partial

import lora_files
import pytest
import quantised_files as files
import refusals
import torch
import wan_files
from safetensors.torch import load_file
from torch import Tensor

from hiar_model import ExecutionConfig, VideoPipeline, load_video_model
from hiar_model.config import SHIPPED
from hiar_model.io import packed
from hiar_model.models import checkpoint
from hiar_model.models.checkpoint import load_transformer, loading_bytes, open_checkpoint, save_transformer
from hiar_model.models.lora import read_lora
from hiar_model.models.low_rank import Adapter, Adapters
from hiar_model.models.quantized_linear import in_8_bits, linear_dtype_of, quantize_layers, quantized, quantized_bytes

pytestmark = pytest.mark.cpu

E4M3 = "float8_e4m3fn"
AS_THEY_ARE = (
    "comfy scale_weight e4m3", "comfy_quant fp8", "lightx2v fp8", "rows without a dimension", "scale of one number",
    "cast", "diffusers",
)  # fmt: skip
INT8_AS_THEY_ARE = ("comfy_quant int8", "lightx2v int8")
load_8_bits = partial(load_transformer, linear_dtype=E4M3)


def same(ours, theirs) -> None:
    """Every tensor of two models has the same bits."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value.contiguous().view(torch.uint8), theirs[key].contiguous().view(torch.uint8)), key


def plain(folder):
    """A file of bfloat16 weights."""
    state = {key: value.to(torch.bfloat16) for key, value in files.native().items()}
    return files.write(folder / "w.safetensors", (state, {}))


def written(folder, name: str):
    if name == "Q6_K":
        files.write_gguf(folder / "w.gguf", files.native(), ("Q8_0", "Q6_K"))
        return folder / "w.gguf"
    return (
        plain(folder) if name == "plain" else files.write(folder / "w.safetensors", files.FILES[name](files.native()))
    )


@pytest.mark.parametrize(
    ("name", "to"), [*((name, E4M3) for name in AS_THEY_ARE), *((name, "int8") for name in INT8_AS_THEY_ARE)]
)
def test_the_bits_of_a_file_stay(tmp_path, name, to):
    path, meaning = written(tmp_path, name), files.FILES[name](files.native())[1]
    model, full = load_transformer(path, linear_dtype=to), load_transformer(path).state_dict()
    stored, _ = open_checkpoint(path)
    state = model.state_dict()
    assert linear_dtype_of(model) == getattr(torch, to) and model.blocks[0].ffn[0].bias.dtype == torch.bfloat16
    for key, value in full.items():
        if not in_8_bits(key):
            assert torch.equal(state[key], value), key
            continue
        assert torch.equal(state[key].view(torch.uint8), stored[key].values.view(torch.uint8)), key
        assert torch.equal(state[key].double() * state[f"{key}_scale"].double()[:, None], meaning[key]), key
    line = open_checkpoint(path)[1].describe(to)
    assert f"weights of large linear layers in {to}: 12 of 12 as they are in the file" in line
    assert "dequantised" not in line


@pytest.mark.parametrize("name", ["plain", "Q6_K", *(name for name in files.FILES if name not in AS_THEY_ARE)])
def test_all_else_is_quantised_as_a_rollout_would(tmp_path, name):
    path = written(tmp_path, name)
    for dtype in (None, torch.float32):
        same(load_8_bits(path, dtype=dtype), quantized(load_transformer(path, dtype=dtype)))
    assert "in float8_e4m3fn: quantised layer by layer" in open_checkpoint(path)[1].describe(E4M3)


def test_lora_is_merged_and_then_quantised(tmp_path):
    """Layers that it leaves alone keep the bits of the file."""
    lora = lora_files.write(tmp_path, "native", files.native())
    path = written(tmp_path, "plain")
    same(load_8_bits(path, lora=(lora, 0.5)), quantized(load_transformer(path, lora=(lora, 0.5))))
    path = written(tmp_path, "lightx2v fp8")
    ours, full = load_8_bits(path, lora=(lora, 0.5)), quantized(load_transformer(path, lora=(lora, 0.5)))
    ours, full, alone = ours.state_dict(), full.state_dict(), load_8_bits(path).state_dict()
    for key in filter(in_8_bits, alone):
        changed = key.removesuffix(".weight") in lora_files.MODULES
        assert torch.equal(ours[key].float(), (full if changed else alone)[key].float()), key
        assert torch.equal(ours[key].float(), alone[key].float()) != changed, key


@torch.no_grad()
def forward(model) -> Tensor:
    dtype = model.head.modulation.dtype
    x = torch.randn(1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    return model(x, torch.tensor([[1000.0, 500, 0]]), torch.ones(1, 3, model.config.text_dim, dtype=dtype))


def test_lora_beside_weights_that_exist_in_8_bits_only(tmp_path):
    path = plain(tmp_path)
    state, model = load_transformer(path).state_dict(), load_8_bits(path)
    lora = read_lora(lora_files.write(tmp_path, "native", files.native()), model.state_dict())

    def beside(base):
        return Adapters([base], [Adapter(lora, "a", 0.5)])

    ours, theirs = beside(model), beside(load_transformer(path))
    theirs_in_8_bits = quantized(theirs.transformers[0])
    alone = forward(model)
    for scale in (0.5, -1.0):
        for one in (ours, theirs):
            one.adapters[0].scale = scale
            one.write()
        assert torch.equal(forward(ours.transformers[0]), forward(theirs_in_8_bits))
    assert not torch.equal(forward(ours.transformers[0]), alone) and torch.equal(forward(model), alone)
    more = {"diffusion_model.blocks.1.ffn.0.diff": torch.full((96, 256), 0.1)}
    lora = read_lora(lora_files.write(tmp_path, "ComfyUI", state, more=more, name="full"), state)
    line = refusals.refusal(beside, model)
    assert "blocks.1.ffn.0.weight" in line and "hiar convert --lora" in line


def test_it_is_written_as_it_is_and_read_again(tmp_path):
    """In the dialect weight_scale with rows."""
    model = load_8_bits(plain(tmp_path))
    save_transformer(model, tmp_path / "again.safetensors")
    same(load_8_bits(tmp_path / "again.safetensors"), model)
    keys = load_file(tmp_path / "again.safetensors")
    assert keys["blocks.0.self_attn.k.weight_scale"].shape == (256,)
    assert keys["blocks.0.self_attn.k.weight"].dtype == torch.float8_e4m3fn
    assert "a scale for each row" in str(open_checkpoint(tmp_path / "again.safetensors")[1])


def test_a_cast_of_the_model_leaves_the_8_bits_alone(tmp_path):
    model, other = load_8_bits(plain(tmp_path)), load_8_bits(plain(tmp_path))
    forward(model)  # a small layer keeps its weights in float32 from here on
    model.to(torch.float32)
    assert model.blocks[0].ffn[0].bias.dtype == torch.float32
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.float(), theirs.float())
    assert forward(model).dtype == torch.float32


def test_tensors_are_handed_over_as_they_were(tmp_path):
    """By sorted keys, so that a hash of them is that of the full weights."""
    path = written(tmp_path, "lightx2v fp8")
    seen: dict[str, Tensor] = {}
    load_8_bits(path, on_tensor=seen.__setitem__)
    full = load_transformer(path).state_dict()
    assert list(seen) == sorted(full) and all(torch.equal(value, full[key]) for key, value in seen.items())
    again: dict[str, Tensor] = {}
    load_transformer(path, on_tensor=again.__setitem__)
    assert list(again) == list(seen) and all(torch.equal(value, seen[key]) for key, value in again.items())


def test_no_full_copy(tmp_path, monkeypatch):
    """The peak while loading is the 8-bit model and what is said for one matrix; before, all of the full weights."""
    monkeypatch.setattr(packed, "CHUNK", 1 << 12)
    monkeypatch.setattr("hiar_model.models.quantized_linear.CHUNK", 1 << 12)
    config = wan_files.WAN
    for name in ("comfy scale_weight e4m3", "deepseek"):
        path = written(tmp_path, name)
        state, info = open_checkpoint(path)
        state = dict(sorted(state.items(), key=lambda item: item[0].startswith("blocks.")))
        monkeypatch.setattr(checkpoint, "open_checkpoint", lambda *_, state=state, info=info: (dict(state), info))
        with files.Allocated() as live:
            contents = (vars(x).values() if isinstance(x, packed.Packed) else [x] for x in state.values())
            seen = [x[:0] for x in itertools.chain(*contents) if isinstance(x, Tensor)]
            before = live.restart()
            model = load_8_bits(path, dtype=torch.bfloat16)
            peak, own = live.peak - before, sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        said = loading_bytes(config, torch.bfloat16, eight_bits=True)
        assert seen and peak <= own + said, (name, peak, own, said)
        assert said < 0.5 * 2 * quantized_bytes(config, torch.float8_e4m3fn, True)[1]  # far less than the full layers


def test_a_model_on_no_device_has_the_shapes(tmp_path):
    path = plain(tmp_path)
    empty, model = load_8_bits(path, device="meta"), load_8_bits(path)
    shapes = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in empty.state_dict().items()} == shapes
    assert all(value.is_meta for value in empty.state_dict().values())


@functools.cache
def toy():
    return load_video_model("toy", "cpu")


def test_the_toy_in_8_bits_makes_the_video_that_its_full_weights_make():
    options = {"num_frames": 12, "steps": 2, "order": "stream"}
    expected = VideoPipeline(toy(), ExecutionConfig(linear_dtype=E4M3))("a red circle moving right", **options)
    pipeline = VideoPipeline("toy", ExecutionConfig(linear_dtype=E4M3), device="cpu")
    video = pipeline("a red circle moving right", **options)
    assert (video.frames == expected.frames).all()
    assert linear_dtype_of(pipeline.model.transformer) is not None and linear_dtype_of(toy().transformer) is None
    assert pipeline.model.weights_sha256 == toy().weights_sha256
    loaded = load_video_model("toy", "cpu", linear_dtype=torch.float8_e4m3fn)
    video = VideoPipeline(loaded)("a red circle moving right", **options)  # which says nothing of 8 bits
    assert (video.frames == expected.frames).all()
    assert video.metadata["linear_dtype"] == E4M3 and "--linear-dtype" in video.metadata["command"]


def test_a_wan_folder_and_the_experts_of_its_steps(tmp_path):
    """The identity of a checkpoint, by which sessions are resumed, does not depend on how it is loaded."""
    folder, fp8 = wan_files.write_original(tmp_path / "wan"), written(tmp_path, "lightx2v fp8")
    full, said = load_video_model(folder, "cpu"), []
    model = load_video_model(folder, "cpu", linear_dtype=E4M3, on_checkpoint=said.append)
    assert model.weights_sha256 == full.weights_sha256 and linear_dtype_of(model.transformer) is not None
    same(model.transformer, quantized(full.transformer))
    assert "in float8_e4m3fn: quantised layer by layer" in said[0]
    model = load_video_model(folder, "cpu", linear_dtype=E4M3, checkpoint={"0": str(fp8), "1-3": str(folder)})
    assert all(linear_dtype_of(one) is not None for one in model.networks(4))
    same(model.networks(4)[0], load_8_bits(fp8))
    with torch.no_grad():
        assert forward(model.networks(4)[0]).isfinite().all()


def test_refusals(tmp_path):
    for call in (load_video_model, partial(load_transformer, next(iter(SHIPPED)))):
        line = refusals.refusal(partial(call, linear_dtype="int4"))
        assert "linear_dtype must be one of float8_e4m3fn, int8, got 'int4'" in line
    model = quantize_layers(load_transformer(plain(tmp_path)))
    assert quantized(model) is model and quantize_layers(model) is model
