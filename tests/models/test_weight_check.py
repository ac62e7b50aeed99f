"""A checkpoint whose scales are wrong is refused by the name of the layer; weights that are right never are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import quantised_files as files
import refusals
import torch
import wan_files
from torch import Tensor

from hiar_model.cli import main
from hiar_model.config import WanConfig
from hiar_model.models.checkpoint import load_transformer, read_checkpoint
from hiar_model.models.transformer import HiARTransformer
from hiar_model.models.weight_check import LARGEST, SIBLINGS, WeightCheck

pytestmark = pytest.mark.cpu

LAYER = "blocks.1.self_attn.k"
SCALES = {"scale_weight": "tensor", "weight_scale": "row"}


@functools.lru_cache
def trained(name: str = "toy") -> dict[str, Tensor]:
    """Weights of a shipped model, with layers in six blocks."""
    return {key: value.float() for key, value in read_checkpoint(name)[0].items()}


def saved(folder, tensors, name: str = "toy"):
    """A checkpoint with the sizes of the shipped model, whose heads are narrower than published ones."""
    from hiar_model.models.checkpoint import file_header

    return files.write(folder / "w.safetensors", (tensors, {}), file_header(read_checkpoint(name)[1].config))


def broken(change: Callable[[Tensor], Tensor], only: str | None = LAYER, dtype=files.E4M3, scale="scale_weight"):
    """Quantised weights with some scales changed."""
    tensors, _ = files.scaled(trained(), dtype, scale, per=SCALES[scale])
    for key in tensors:
        if key.endswith(f".{scale}") and (only is None or key == f"{only}.{scale}"):
            tensors[key] = change(tensors[key].clone())
    return tensors


def one_row(scale: Tensor) -> Tensor:
    scale[3] *= 1000
    return scale


@pytest.mark.parametrize("dtype", [files.E4M3, torch.int8], ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("change", [torch.ones_like, torch.reciprocal, torch.square], ids=["lost", "divided", "twice"])
def test_one_wrong_scale_names_its_layer(tmp_path, change, scale, dtype):
    path = saved(tmp_path, broken(change, dtype=dtype, scale=scale))
    line = refusals.refusal(load_transformer, path)
    assert f"{path}: {LAYER}.weight has weights of size" in line and "its scale is" in line


@pytest.mark.parametrize("change", [torch.ones_like, torch.reciprocal, torch.square], ids=["lost", "divided", "twice"])
def test_all_scales_wrong(tmp_path, change):
    line = refusals.refusal(load_transformer, saved(tmp_path, broken(change, only=None)))
    assert "blocks." in line and ("its scale is missing or wrong" in line or "their scales are wrong" in line)


def test_scales_that_are_not_in_the_file(tmp_path):
    """What a picture of pure white has been made of, by others."""
    tensors = {key: x for key, x in broken(torch.clone).items() if not key.endswith("scale_weight")}
    line = refusals.refusal(load_transformer, saved(tmp_path, tensors))
    assert ".weight has weights of size" in line and "its scale is missing or wrong" in line
    del tensors["blocks.0.cross_attn.k.weight"]
    tensors = broken(torch.clone)
    del tensors[f"{LAYER}.scale_weight"]
    assert f"{LAYER}.weight has weights of size" in refusals.refusal(load_transformer, saved(tmp_path, tensors))


def test_one_wrong_row(tmp_path):
    line = refusals.refusal(load_transformer, saved(tmp_path, broken(one_row, scale="weight_scale")))
    assert f"{LAYER}.weight, row 3 is " in line and "its scale is wrong" in line


def test_numbers_that_are_not_finite(tmp_path):
    tensors = broken(torch.clone)
    weight = tensors[f"{LAYER}.weight"].float()
    weight[0, 0] = float("nan")
    tensors[f"{LAYER}.weight"] = weight.to(files.E4M3)
    line = refusals.refusal(load_transformer, saved(tmp_path, tensors))
    assert f"{LAYER}.weight has numbers that are not finite" in line
    tensors = broken(lambda scale: scale * 1e5)
    assert f"{LAYER}.weight has" in refusals.refusal(load_transformer, saved(tmp_path, tensors), dtype=torch.float16)


def test_the_command_line_ends_with_an_error_and_no_file(tmp_path, capsys):
    path = saved(tmp_path, broken(torch.ones_like))
    assert main(["convert", str(path), str(tmp_path / "out.safetensors"), "--to", "native"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{LAYER}.weight has weights of size" in told
    assert [one.name for one in tmp_path.iterdir()] == ["w.safetensors"]


def test_no_video_of_wrong_weights(here, capsys):
    folder = wan_files.write_original(here / "wan")
    tensors = dict(files.comfy(files.native())[0])
    del tensors[f"model.diffusion_model.{LAYER}.scale_weight"]
    path = files.write(here / "w.safetensors", (tensors, {}))
    words = ["generate", wan_files.PROMPT, "-o", "a.mp4", "--model", str(folder), "--checkpoint", str(path)]
    assert main([*words, "--height", "64", "--width", "64", "--num-frames", "9"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert f"{LAYER}.weight has weights of size" in told[-1] and "its scale is missing or wrong" in told[-1]
    assert {one.name for one in here.iterdir()} == {"wan", "w.safetensors"}


def test_a_wrong_plain_layer_is_not_blamed_on_scales(tmp_path):
    """Weights that are not quantised have no scale that could be wrong."""
    tensors = broken(torch.clone)
    tensors["head.head.weight"] = tensors["head.head.weight"] * 1000
    load_transformer(saved(tmp_path, tensors))


# No false alarms


@pytest.mark.parametrize("name", ["toy", "scenes"])
@pytest.mark.parametrize("dtype", [files.E4M3, files.E5M2, torch.int8], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_trained_weights_pass(tmp_path, name, dtype, scale):
    tensors, _ = files.scaled(trained(name), dtype, scale, per=SCALES[scale])
    load_transformer(saved(tmp_path, tensors, name))


@pytest.mark.parametrize("dim", [16, 256])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.nn.init.xavier_uniform_(p),
        lambda p: torch.nn.init.kaiming_uniform_(p, a=math.sqrt(5)),
        lambda p: p.normal_(std=0.02),
        lambda p: p.zero_(),
    ],
    ids=["xavier", "kaiming", "normal 0.02", "zeros"],
)
def test_fresh_weights_pass(dim, make):
    """As torch and Wan's code start training, output layers of blocks and the head at zero."""
    torch.manual_seed(0)
    model = HiARTransformer(WanConfig(dim=dim, ffn_dim=2 * dim, num_heads=1, num_layers=3, freq_dim=8, text_dim=8))
    check = WeightCheck("file")
    for key, value in model.state_dict().items():
        if files.is_linear(key, value):
            make(value)
        if key.endswith((".o.weight", "ffn.2.weight", "head.head.weight")):
            value.zero_()
        check.see(key, value, quantised=True)
    check.finish()


def test_a_layer_that_has_just_begun_to_learn():
    """All layers of its name have."""
    check = WeightCheck("file")
    for i in range(4):
        check.see(f"blocks.{i}.ffn.0.weight", torch.randn(32, 32) / 6, quantised=True)
        check.see(f"blocks.{i}.ffn.2.weight", torch.randn(32, 32) * 1e-5, quantised=True)
    check.finish()


@pytest.mark.parametrize(("factor", "passes"), [(SIBLINGS * 0.9, True), (SIBLINGS * 1.1, False)])
@pytest.mark.parametrize("power", [1, -1])
def test_the_limit_between_blocks(factor, passes, power):
    check = WeightCheck("file")
    for i in range(5):
        check.see(f"blocks.{i}.ffn.0.weight", torch.eye(8) * (factor**power if i == 3 else 1.0), quantised=True)
    if passes:
        check.finish()
    else:
        assert "file: blocks.3.ffn.0.weight has weights of size" in refusals.refusal(check.finish)


def test_the_limit_of_one_matrix():
    check = WeightCheck("file")
    check.see("head.head.weight", torch.eye(8) * (0.99 * LARGEST), quantised=True)
    line = refusals.refusal(check.see, "head.head.weight", torch.eye(8) * (1.01 * LARGEST), quantised=True)
    assert "head.head.weight has weights of size 64.6 once it is dequantised, expected about 1 and at most 64" in line
