"""Wan's VAE from disk: diffusers' AutoencoderKLWan with the tensors of either published layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..io.files import refuse_stand_in
from ..io.weight_files import only_one
from .vae_fused import fuse, to_channels_last

ORIGINAL = "Wan2.1_VAE.pth"  # beside the weights of the original layout
DIFFUSERS = "diffusion_pytorch_model.safetensors"  # in the folder vae/ of diffusers' layout, beside config.json
_OF_ORIGINAL, _OF_DIFFUSERS = "decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"


def load_vae(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    fused: bool = True,
    channels_last: bool = False,
) -> Any:
    """diffusers' AutoencoderKLWan from a file or folder, in evaluation mode.

    Args:
        path: ``Wan2.1_VAE.pth`` or a folder that holds it; diffusers' ``vae`` folder or the pipeline folder around it.
        dtype: of weights and computation; None: bfloat16 on CUDA, else float32.
        fused: compute norm, SiLU and causal padding before each convolution in one op
            (:func:`hiar_kernels.rms_silu_pad`); state-dict keys stay the same.
        channels_last: memory format of weights and features (bench/vae/bench_vae.py measures both).

    Raises:
        ValueError: one line: no VAE there, or two, a corrupt file, another architecture, or diffusers is not installed.
    """
    file = find_vae(Path(path))
    state = _tensors(file)
    beside = file.parent / "config.json"
    if _OF_ORIGINAL in state:
        from_original = library("loaders.single_file_utils").convert_wan_vae_to_diffusers
        state, config = from_original(state), None
    elif _OF_DIFFUSERS in state:
        config = _json(beside) if beside.is_file() else None
    else:
        raise ValueError(f"{file}: no VAE of Wan 2.1: its keys have neither {_OF_ORIGINAL} nor {_OF_DIFFUSERS}")
    vae = _empty(config if config is not None else _sizes(state, file), beside if config is not None else file)
    _check_keys(state, vae.state_dict(), file)
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    vae.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)
    vae = to_channels_last(vae) if channels_last else vae
    return (fuse(vae) if fused else vae).eval().requires_grad_(False)


def library(module: str) -> Any:
    """A module of diffusers, imported when it is needed."""
    from importlib import import_module

    try:
        return import_module(f"diffusers.{module}")
    except ImportError as error:
        raise ValueError(f"Wan's VAE needs diffusers: pip install 'hiar-kernels[wan]' ({error})") from error


def find_vae(path: Path) -> Path:
    """The file of a VAE's weights that a path means; ValueError if there is none, or two."""
    if path.is_file():
        return path
    candidates = [
        path / name
        for name in (DIFFUSERS, f"vae/{DIFFUSERS}", ORIGINAL)
        if (path / name).is_file() and (name != DIFFUSERS or _OF_DIFFUSERS in _keys(path / name))
    ]
    if candidates and candidates[0].name == DIFFUSERS:
        candidates[1:1] = sorted(file for file in candidates[0].parent.glob("*.safetensors") if file.name != DIFFUSERS)
    only_one(candidates, f"the VAE of {path}")
    if candidates:
        return candidates[0]
    raise ValueError(f"{path}: no VAE there; expected vae/{DIFFUSERS} (diffusers) or {ORIGINAL} (original)")


def _keys(file: Path) -> list[str]:
    """Tensor names, which tell a VAE from a transformer's file of the same name."""
    refuse_stand_in(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise _corrupt(file, error) from error


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file; pickles are loaded with weights_only."""
    refuse_stand_in(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each format and each kind of damage raises another type
        raise _corrupt(file, error) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: expected a state dict of tensors, got a {type(state).__name__} of other things")
    return state


def _corrupt(file: Path, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [""])[0].partition(". ")[0][:150]
    return ValueError(f"{file}: corrupt, or no plain state dict: {type(error).__name__}: {reason}")


def _json(file: Path) -> dict[str, Any]:
    refuse_stand_in(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: corrupt, or not JSON: {error}") from error
    name = values.get("_class_name") if isinstance(values, dict) else None
    if name != "AutoencoderKLWan":
        raise ValueError(f"{file}: describes {name}, expected AutoencoderKLWan")
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _sizes(state: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """Sizes from the tensor shapes; the others are AutoencoderKLWan's defaults."""
    keys = ("encoder.conv_in.weight", "post_quant_conv.weight", "decoder.norm_out.gamma")
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"{file}: the tensor {missing[0]} (in diffusers' names) is missing")
    base, channels, decoder = (len(state[key]) for key in keys)
    return {"base_dim": base, "z_dim": channels, "decoder_base_dim": decoder}


def _empty(config: dict[str, Any], file: Path) -> Any:
    """The VAE of a configuration, on the meta device."""
    try:
        with torch.device("meta"):
            vae = library("models").AutoencoderKLWan(**config)
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file}: no configuration of AutoencoderKLWan: {str(error).splitlines()[0]}") from error
    for name in ("latents_mean", "latents_std"):
        known, channels = len(vae.config[name]), vae.config.z_dim
        if known != channels:
            raise ValueError(f"{file}: {channels} latent channels, but {name} has {known}: give diffusers' folder")
    return vae


def _check_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path) -> None:
    """ValueError that names the first tensor that is missing, unexpected or of another shape."""
    for key in [*expected, *state]:
        if key not in state:
            raise ValueError(f"{file}: the tensor {key} (in diffusers' names) is missing")
        if key not in expected:
            raise ValueError(f"{file}: unexpected tensor {key} (in diffusers' names)")
        if state[key].shape != expected[key].shape:
            raise ValueError(f"{file}: {key} is {list(state[key].shape)}, expected {list(expected[key].shape)}")
