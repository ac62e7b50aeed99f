"""Quantised checkpoints: what each layout means, and that whatever is not understood, or wrong, is refused by name."""

from __future__ import annotations

import functools
import json
import sys
from functools import partial
from itertools import chain

import numpy as np
import pytest
import quantised_files as files
import refusals
import torch
import wan_files
from lora_files import MODULES, expected
from lora_files import write as write_lora
from safetensors.torch import load_file

from hiar_model.cli import main
from hiar_model.io import packed
from hiar_model.io.packed import BLOCKS, Blocks, Packed
from hiar_model.io.weight_files import read_tensors
from hiar_model.models import checkpoint
from hiar_model.models.checkpoint import load_transformer, loading_bytes, open_checkpoint, read_checkpoint
from hiar_model.models.convert import convert

pytestmark = pytest.mark.cpu

refusal = partial(refusals.refusal, open_checkpoint)
LAYER = "blocks.1.ffn.0"


@functools.lru_cache
def written(name: str) -> files.Written:
    return files.FILES[name](files.native())


def file(folder, tensors, header=None):
    return files.write(folder / "w.safetensors", (tensors, {}), header)


# What a layout means


@pytest.mark.parametrize("name", files.FILES)
def test_each_layout_of_safetensors(tmp_path, name):
    path = files.write(tmp_path / "w.safetensors", written(name))
    _, meaning = written(name)
    state, info = read_checkpoint(path)
    assert info.quantised is not None and sum(info.quantised.kinds.values()) == len(meaning) == 20
    for key, weight in files.native().items():
        if files.is_linear(key, weight):
            assert torch.equal(state[key], meaning[key].float().to(torch.bfloat16)), key
            assert (state[key].float() - weight).norm() < 0.08 * weight.norm(), key  # e5m2 has steps of a quarter
        else:
            assert torch.equal(state[key], weight), key
    loaded = load_transformer(path).state_dict()
    assert all(torch.equal(loaded[key], value.to(torch.bfloat16)) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("comfy scale_weight e4m3", ["scale_weight as ComfyUI", "20 tensors of float8_e4m3fn with one scale each",
                                     "20 scales of inputs", "scale_input"]),
        ("comfy_quant int8", ["comfy_quant", "20 tensors of int8 with one scale each"]),
        ("lightx2v int8", ["LightX2V", "int8 with a scale for each row"]),
        ("deepseek", ["weight_scale_inv", "for each block of 128 x 128"]),
        ("groups of a row", ["for each block of 1 x 32"]),
        ("cast", ["cast without scales", "float8_e4m3fn without scale"]),
    ],
)  # fmt: skip
def test_it_is_said_what_a_file_is(tmp_path, name, words, monkeypatch):
    path = files.write(tmp_path / "w.safetensors", written(name))
    monkeypatch.setattr(packed.Scaled, "dequantise", lambda *_: pytest.fail("weights are read"))
    line = str(open_checkpoint(path)[1])
    assert all(word in line for word in words), line
    assert "dequantised layer by layer to bfloat16" in line and "\n" not in line


def test_bytes_that_are_float8_and_marks_in_the_header(tmp_path):
    """As ComfyUI's QUANTIZATION.md describes it."""
    tensors, meaning = files.scaled(files.native(), files.E4M3, "weight_scale")
    layers = {f"model.{key.removesuffix('.weight')}": {"format": "float8_e4m3fn"} for key in meaning}
    stored = {f"model.{key}": x.view(torch.uint8) if key in meaning else x for key, x in tensors.items()}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    state, _ = read_checkpoint(file(tmp_path, stored, header))
    plain, _ = read_checkpoint(files.write(tmp_path / "b.safetensors", (tensors, {})))
    assert all(torch.equal(state[key], plain[key]) for key in plain)


def test_a_scale_of_one_beside_plain_weights_says_nothing(tmp_path):
    extra = {f"{LAYER}.scale_weight": torch.ones(()), f"{LAYER}.weight_zero_point": torch.zeros(1, dtype=torch.int8)}
    state, info = read_checkpoint(file(tmp_path, files.native() | extra))
    assert info.quantised is None and torch.equal(state[f"{LAYER}.weight"], files.native()[f"{LAYER}.weight"])


# GGUF


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_have_the_bits_of_the_gguf_package(kind, monkeypatch):
    import gguf

    monkeypatch.setattr(packed, "CHUNK", 512)
    numbers, nbytes, _ = BLOCKS[kind]
    assert (numbers, nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(1).integers(0, 256, (9, 512 // numbers * nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(gguf.quants.dequantize(random, gguf.GGMLQuantizationType[kind]))
    ours = Blocks("x", kind, torch.Size((9, 512)), torch.from_numpy(random)).dequantise(torch.float32)
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()) and torch.equal(ours.isnan(), theirs.isnan())
    assert ours.isfinite().float().mean() > 0.5


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kinds", [("F16",), ("BF16",), ("Q8_0",), ("Q6_K", "Q5_K", "Q4_K")])
def test_each_gguf(tmp_path, kinds, prefix):
    meaning = files.write_gguf(tmp_path / "w.gguf", files.native(), kinds, prefix=prefix)
    state, info = read_checkpoint(tmp_path / "w.gguf")
    assert info.config == wan_files.WAN and state.keys() == meaning.keys()
    assert (info.quantised is None) == (kinds[0] in ("F16", "BF16"))
    assert all(torch.equal(state[key].float(), x.to(state[key].dtype).float()) for key, x in meaning.items())
    loaded = load_transformer(tmp_path / "w.gguf", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[key], x) for key, x in meaning.items())


def test_a_tensor_that_was_reshaped_and_no_architecture(tmp_path):
    """ComfyUI-GGUF gives rows of 256 to what has other ones, with the shape beside it; other writers name it "pig"."""
    import gguf

    shape = (96, 40)
    data = files.gguf_blocks("Q4_K", 15, 256)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "pig")
    writer.add_array(f"comfy.gguf.orig_shape.{LAYER}.weight", shape)
    writer.add_tensor(f"{LAYER}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    content, header = read_tensors(tmp_path / "w.gguf")
    tensor = content[f"{LAYER}.weight"]
    assert tuple(tensor.shape) == shape and header == {"general.architecture": "pig"}
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_K).reshape(shape)
    assert torch.equal(tensor.dequantise(torch.float32), torch.from_numpy(theirs))


def test_a_folder_with_one_gguf(tmp_path):
    files.write_gguf(tmp_path / "a.gguf", files.native(), ("Q8_0",))
    assert open_checkpoint(tmp_path)[1].files == (tmp_path / "a.gguf",)
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    assert "two files" in refusal(tmp_path) and "a.gguf and " in refusal(tmp_path)


def test_gguf_files_that_are_refused(tmp_path, monkeypatch):
    import gguf

    path = tmp_path / "w.gguf"
    files.write_gguf(path, files.native(), ("Q8_0",), architecture="t5encoder")
    assert refusal(path).endswith("a GGUF file of a t5encoder model, expected wan")
    without = {key: x for key, x in files.native().items() if key != "patch_embedding.weight"}
    files.write_gguf(path, without, ("Q8_0",))  # as ComfyUI-GGUF's first step leaves it
    assert "1 missing key (patch_embedding.weight)" in refusal(path)
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_tensor("a.weight", np.zeros((2, 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    assert "GGUF type Q4_0 is not read (a.weight); legal: F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K" in refusal(path)
    path.write_bytes(path.read_bytes()[:100])
    assert "corrupt, or not GGUF" in refusal(path)
    path.write_bytes(b"something else")
    assert "corrupt, or not GGUF" in refusal(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'hiar-kernels[gguf]'" in refusal(path)


# Refused by name


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("weight.absmax", "bitsandbytes"),
        ("weight.quant_map", "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
        ("qweight", "GPTQ or AWQ"),
        ("wscales", "Nunchaku"),
        ("weight_packed", "packed 4-bit"),
        ("weight_scale_2", "NVFP4"),
        ("pre_quant_scale", "pre_quant_scale"),
        ("weight._data", "optimum-quanto"),
        ("_weight_qdata", "torchao"),
    ],
)
def test_kinds_that_are_not_read(tmp_path, key, words, capsys):
    extra = {f"{LAYER}.{key}": torch.zeros(4, dtype=torch.uint8)}
    path = file(tmp_path, {f"model.{key}": x for key, x in (files.native() | extra).items()})
    line = refusal(path)
    assert f"{LAYER}.{key} makes it" in line and words in line and "which is not read; legal: float8 and int8" in line
    assert main(["doctor", "--model", str(path)]) == 2
    assert capsys.readouterr().err == f"hiar: {line}\n"


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ({"format": "nvfp4"}, "quantised as nvfp4, which is not read; legal: float8_e4m3fn, float8_e5m2, int8_"),
        ({"format": "mxfp8"}, "quantised as mxfp8"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}, "rotated weights (convrot)"),
    ],
)
def test_formats_of_comfy_that_are_not_read(tmp_path, mark, words):
    tensors = dict(files.comfy_quant(files.native())[0])
    tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    assert words in refusal(file(tmp_path, tensors)) and LAYER in refusal(file(tmp_path, tensors))


SCALE = f"{LAYER}.weight_scale"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({SCALE: torch.tensor(-1.0)}, "weight_scale has numbers that are negative or not finite"),
        ({SCALE: torch.full((96, 1), float("nan"))}, "negative or not finite"),
        ({SCALE: torch.ones(5)}, "wrong shape: blocks.1.ffn.0.weight_scale is [5], for blocks.1.ffn.0.weight ["),
        ({SCALE: torch.ones(1, 256)}, "expected one number, [96], [96, 1], or one for each block of 128 x 128"),
        ({SCALE: torch.ones(0)}, "wrong shape"),
        ({SCALE: torch.ones((), dtype=torch.int32)}, "weight_scale is torch.int32, expected float32"),
        ({f"{LAYER}.scale_weight": torch.ones(())}, "has two scales: "),
        ({"blocks.9.x.weight_scale": torch.ones(())}, "is a scale, but there is no blocks.9.x.weight"),
        ({f"{LAYER}.weight": torch.ones(96, 256)}, "is a scale of blocks.1.ffn.0.weight, which is torch.float32"),
        ({f"{LAYER}.weight_zero_point": torch.ones(96, 1)}, "zero_point is not 0"),
        ({f"{LAYER}.weight": torch.ones(96, 256, dtype=torch.int16)}, "which is torch.int16; a scale belongs to"),
    ],
)  # fmt: skip
def test_scales_that_do_not_fit(tmp_path, change, words):
    tensors = files.scaled(files.native(), scale="weight_scale")[0] | change
    assert words in refusal(file(tmp_path, tensors))


def test_int8_without_scales(tmp_path):
    tensors = {key: x for key, x in written("lightx2v int8")[0].items() if not key.endswith("_scale")}
    assert "is int8 without a scale; expected blocks.0" in refusal(file(tmp_path, tensors))


def test_a_scale_of_zero(tmp_path):
    tensors = dict(written("lightx2v int8")[0])
    tensors[SCALE] = tensors[SCALE].clone()
    tensors[SCALE][7] = 0
    path = file(tmp_path, tensors)
    line = refusals.refusal(load_transformer, path)
    assert line == f"{path}: {LAYER}.weight: a scale is 0 where the numbers are not"
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].clone()
    tensors[f"{LAYER}.weight"][7] = 0  # as amax / 127 of a row of zeros
    assert not load_transformer(file(tmp_path, tensors)).blocks[1].ffn[0].weight[7].any()


# What becomes of it


def test_convert_writes_bfloat16(tmp_path, capsys):
    source = files.write(tmp_path / "w.safetensors", written("comfy scale_weight e4m3"))
    assert main(["convert", str(source), str(tmp_path / "out.safetensors"), "--to", "native"]) == 0
    assert "quantised, scale_weight as ComfyUI writes it" in capsys.readouterr().out
    result = load_file(tmp_path / "out.safetensors")
    want, _ = read_checkpoint(source)
    assert result.keys() == want.keys() and all(torch.equal(x, want[key]) for key, x in result.items())
    assert open_checkpoint(tmp_path / "out.safetensors")[1].quantised is None
    line = refusals.refusal(convert, source, tmp_path / "out.gguf", "native")
    assert line.endswith("out.gguf: --to native writes a folder or name.safetensors")


@pytest.mark.parametrize("call", ["load", "convert"])
def test_lora_is_added_before_rounding(tmp_path, call):
    lora = write_lora(tmp_path, "native", files.native())
    source = files.write(tmp_path / "w.safetensors", written("lightx2v fp8"))
    if call == "load":
        state = load_transformer(source, lora=(lora, 0.5)).state_dict()
    else:
        convert(source, tmp_path / "out.safetensors", "native", lora=(lora, 0.5))
        state, _ = read_checkpoint(tmp_path / "out.safetensors")
    exact = expected(files.native() | written("lightx2v fp8")[1], 0.5)
    for module in MODULES:
        key = f"{module}.weight"
        if files.is_linear(key, files.native()[key]):
            want = torch.from_numpy(exact[key])
            half_a_unit = want.abs() * 2**-8 + 1e-6  # of bfloat16; sums in float32 before that
            assert bool(((state[key].double() - want).abs() <= half_a_unit).all()), key


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["comfy scale_weight e4m3", "deepseek", *BLOCKS])
def test_no_more_memory_than_is_said(tmp_path, monkeypatch, name, lora):
    monkeypatch.setattr(packed, "CHUNK", 1 << 14)  # smaller than a layer
    monkeypatch.setattr(checkpoint, "_LARGEST_RANK", 4)
    adapters = [write_lora(tmp_path / "lora", "native", files.native())] if lora else []
    mapped = sum(x.nbytes for file in adapters for x in load_file(file).values())
    if name in BLOCKS:
        files.write_gguf(path := tmp_path / "w.gguf", files.native(), (name,))
    else:
        path = files.write(tmp_path / "w.safetensors", written(name))
    state, info = open_checkpoint(path)
    if not lora:  # the largest part last: blocks; of what is merged that is time_projection, which comes last
        parts = checkpoint._parts
        monkeypatch.setattr(checkpoint, "_parts", lambda names: dict(sorted(parts(names).items())))
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda *_: (dict(state), info))
    with files.Allocated() as live:
        contents = (vars(x).values() if isinstance(x, Packed) else [x] for x in state.values())
        seen = [x[:0] for x in chain(*contents) if isinstance(x, torch.Tensor)]  # memory-mapped: not counted below
        before = live.restart()
        model = load_transformer(path, dtype=torch.bfloat16, lora=adapters)
        beside = live.peak - before - mapped - sum(p.nbytes for p in model.parameters())
    said = loading_bytes(info.config, torch.bfloat16, lora=lora)
    assert seen and 0.4 * said < beside <= said, (beside, said)
