"""Wan's VAE from disk: diffusers' AutoencoderKLWan with the tensors of either published layout."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.weight_files import BIN, PICKLES, check_keys, check_tensors, only_one, read_json, read_tensors, tensor_names
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
    state, _ = read_tensors(file)
    if not isinstance(state, Mapping):
        raise ValueError(f"{file}: holds a {type(state).__name__}, expected a state dict")
    check_tensors(state, file)
    beside = file.parent / "config.json"
    if _OF_ORIGINAL in state:
        from_original = library("loaders.single_file_utils").convert_wan_vae_to_diffusers
        state, config = from_original(state), None
    elif _OF_DIFFUSERS in state:
        config = _config(beside) if beside.is_file() else None
    else:
        raise ValueError(f"{file}: no VAE of Wan 2.1: its keys have neither {_OF_ORIGINAL} nor {_OF_DIFFUSERS}")
    vae = _empty(config if config is not None else _sizes(state, file), beside if config is not None else file)
    check_keys(state, vae.state_dict(), file)
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


def is_full_vae(names: Container[str]) -> bool:
    """Whether keys are those of Wan's own VAE, in either layout."""
    return _OF_ORIGINAL in names or _OF_DIFFUSERS in names


def find_vae(path: Path) -> Path:
    """The file of a VAE's weights that a path means; ValueError if there is none, or two, or a file of no weights."""
    if path.is_file():
        if path.suffix not in (legal := (".safetensors", *PICKLES, BIN)):
            suffix = path.suffix or "no suffix"
            raise ValueError(f"{path}: expected {', '.join(legal)} or a folder, got {suffix!r}")
        return path
    candidates = [
        path / name
        for name in (DIFFUSERS, f"vae/{DIFFUSERS}", ORIGINAL)
        if (path / name).is_file() and (name != DIFFUSERS or _OF_DIFFUSERS in tensor_names(path / name))
    ]
    if candidates and candidates[0].name == DIFFUSERS:
        candidates[1:1] = sorted(file for file in candidates[0].parent.glob("*.safetensors") if file.name != DIFFUSERS)
    only_one(candidates, f"the VAE of {path}")
    if candidates:
        return candidates[0]
    raise ValueError(f"{path}: no VAE there; expected vae/{DIFFUSERS} (diffusers) or {ORIGINAL} (original)")


def _config(file: Path) -> dict[str, Any]:
    values = read_json(file)
    if (name := values.get("_class_name")) != "AutoencoderKLWan":
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
