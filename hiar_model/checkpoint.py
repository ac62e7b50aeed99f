"""Weights in and out under the published Wan keys; training wrappers are peeled off on the way in."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import WanConfig
from .transformer import HiARTransformer

CONFIG_KEY = "hiar_config"  # WanConfig as JSON in the header of the files we write
_PICKLES = (".pth", ".pt")
_INDEX = ".safetensors.index.json"
_WRAPPERS = {"model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
_NETWORKS = ("generator_ema", "generator", "critic")  # of a training checkpoint; the last one is never taken
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HEAD_DIM = 128  # of every published Wan model
_RENAMED = {"in_dim": "in_channels", "out_dim": "out_channels"}
_ABOUT_OTHERS = {"model_type", "window_size", "qk_norm", "cross_attn_norm"}  # published keys that fix no size


def load_transformer(
    path: str | Path,
    config: WanConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> HiARTransformer:
    """A transformer with the weights of a checkpoint, in eval mode.

    Args:
        path: a .safetensors, .pth or .pt file, an index of shards (``*.safetensors.index.json``), or a folder with an
            index, with .safetensors shards, or with .pth / .pt files, in this order of preference. Keys are the
            published Wan ones, behind any of the prefixes ``model.``, ``_fsdp_wrapped_module.``,
            ``_checkpoint_wrapped_module.``, ``_orig_mod.``. Of a training checkpoint with several networks the
            ``generator_ema`` is taken, else the ``generator``.
        config: sizes. None: from the header of a file that :func:`save_transformer` wrote, else from ``config.json``
            beside the weights (the published one, or :meth:`WanConfig.to_dict`); what they leave open is read from
            the tensor shapes. Shapes do not tell the heads: they are dim / 128, as in every published model. Nor do
            they tell text_len and eps: those are WanConfig's defaults.
        dtype: of the weights; None: as in the file (the widest, should they differ).
        device: None: the CPU, where the file is mapped rather than read.

    Raises:
        ValueError: one line: nothing there, not readable, keys missing or unexpected, a wrong shape (actual and
            expected), tensors that are no floating-point weights.
    """
    source = Path(path)
    state, metadata = _read_all(source)
    _check_tensors(state, source)
    if config is None:
        config = _find_config(source, state, metadata)
    with torch.device("meta"):
        model = HiARTransformer(config)
    _check_keys(state, model.state_dict(), source)
    kept = reduce(torch.promote_types, {value.dtype for value in state.values()})
    model.load_state_dict(state, assign=True)
    del state  # what was fused or is cast below need not stay
    return model.to(device=device, dtype=dtype or kept).eval()


def save_transformer(model: HiARTransformer, path: str | Path) -> None:
    """Write the weights to a .safetensors file under the published Wan keys, with the config in its header.

    The file appears whole or not at all: it is written under a temporary name in the same folder and renamed.

    Raises:
        ValueError: another suffix, or a folder that does not exist.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: weights are written as .safetensors, got {target.suffix or 'no suffix'!r}")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: folder {target.parent} does not exist")
    state = {_plain(key): value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(model.config.to_dict())}
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(state, part, metadata)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _plain(key: str) -> str:
    """The key without what FSDP, activation checkpointing, torch.compile and training wrappers put into it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _read_all(source: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Plain keys -> tensors of all files, and the header of the last file that has one."""
    state: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in _weight_files(source):
        content, header = _read(file)
        metadata.update(header)
        for key, value in _network(content, file).items():
            name = _plain(str(key))
            if name in state:
                raise ValueError(f"{file}: {key} is there twice (as {name}); expected every tensor once")
            state[name] = value
    if not state:
        raise ValueError(f"{source}: no weights found: it holds no tensor")
    return state, metadata


def _weight_files(source: Path) -> list[Path]:
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_file():
        if source.name.endswith(_INDEX):
            return _shards(source)
        if source.suffix not in (".safetensors", *_PICKLES):
            found = source.suffix or "no suffix"
            raise ValueError(f"{source}: expected .safetensors, .pth, .pt or a folder, got {found!r}")
        return [source]
    indexes = sorted(source.glob(f"*{_INDEX}"))
    if len(indexes) > 1:
        raise ValueError(f"{source}: several indexes ({_some(p.name for p in indexes)}); give the path of one")
    if indexes:
        return _shards(indexes[0])
    for suffixes in ((".safetensors",), _PICKLES):
        files = sorted(p for p in source.iterdir() if p.suffix in suffixes and not p.name.startswith("."))
        if files:
            return files
    raise ValueError(f"{source}: no weights found; expected *{_INDEX}, *.safetensors, *.pth or *.pt")


def _shards(index: Path) -> list[Path]:
    mapping = _read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{index}: no weights found: expected a weight_map from keys to files")
    names = sorted({str(name) for name in mapping.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index}: names the shard {name}, which is not beside it")
    return [index.parent / name for name in names]


def _read(file: Path) -> tuple[Any, dict[str, str]]:
    """What one file holds, mapped into memory where its format allows, and its header."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)), {}
    except Exception as error:  # each format and each kind of damage raises another type
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0][:150]
        kind = "safetensors" if file.suffix == ".safetensors" else "a plain PyTorch state dict (weights_only)"
        raise ValueError(f"{file}: corrupt, or not {kind}: {type(error).__name__}: {reason}") from error


def _network(content: Any, file: Path) -> Mapping[str, Any]:
    """The state dict, out of a training checkpoint's several."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected a state dict")
    there = [name for name in _NETWORKS if isinstance(content.get(name), Mapping) and content[name]]
    if not there:
        return content
    if there[0] == _NETWORKS[-1]:
        raise ValueError(f"{file}: holds a {there[0]} only, expected {' or '.join(_NETWORKS[:-1])}")
    return content[there[0]]


def _check_tensors(state: Mapping[str, Any], source: Path) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{source}: {name} is a {type(value).__name__}, expected a tensor")
        if value.dtype not in _DTYPES:
            raise ValueError(f"{source}: {name} is {value.dtype}, expected one of {', '.join(map(str, _DTYPES))}")


def _check_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path) -> None:
    problems = []
    for what, keys in (
        ("missing", [key for key in expected if key not in state]),
        ("unexpected", [key for key in state if key not in expected]),
    ):
        if keys:
            problems.append(f"{len(keys)} {what} {'key' if len(keys) == 1 else 'keys'} ({_some(keys)})")
    for key, want in expected.items():
        if key in state and state[key].shape != want.shape:
            problems.append(f"wrong shape: {key} is {list(state[key].shape)}, expected {list(want.shape)}")
            break
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")


def _some(names: Iterable[str], limit: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")


def _find_config(source: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> WanConfig:
    beside = (source if source.is_dir() else source.parent) / "config.json"
    told: dict[str, Any] = {}
    if CONFIG_KEY in metadata:
        beside, told = source, _parse(metadata[CONFIG_KEY], source)
    elif beside.is_file():
        told = _sizes(_read_json(beside), beside)
    values = {**_infer(state), **told}
    if "num_heads" not in values and isinstance(dim := values.get("dim"), int):
        if dim % _HEAD_DIM:
            raise ValueError(f"{source}: dim {dim} is no multiple of {_HEAD_DIM}: pass config= to tell the heads")
        values["num_heads"] = dim // _HEAD_DIM
    lacking = [name for name in ("dim", "ffn_dim", "num_layers") if name not in values]
    if lacking:
        raise ValueError(f"{source}: no Wan transformer: no key tells {', '.join(lacking)}; its keys: {_some(state)}")
    try:
        return WanConfig.from_dict(values)
    except TypeError as error:
        raise ValueError(f"{beside if told else source}: sizes must be numbers: {error}") from error
    except ValueError as error:
        raise ValueError(f"{beside if told else source}: {error}") from error


def _sizes(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Fields of WanConfig from the published config.json or from our own."""
    if "num_attention_heads" in values:
        raise ValueError(f"{file}: describes diffusers' layout; expected the published Wan one (dim, num_heads, ...)")
    kept = {_RENAMED.get(k, k): v for k, v in values.items() if not k.startswith("_") and k not in _ABOUT_OTHERS}
    known = {f.name for f in fields(WanConfig)}
    unknown = sorted(set(kept) - known)
    if unknown:
        raise ValueError(f"{file}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known | set(_RENAMED)))}")
    return kept


def _infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes tell; a key that is absent or has no such shape tells nothing."""

    def shape(key: str, dims: int) -> tuple[int, ...] | None:
        return tuple(state[key].shape) if key in state and state[key].dim() == dims else None

    values: dict[str, Any] = {}
    if patch := shape("patch_embedding.weight", 5):
        values |= {"dim": patch[0], "in_channels": patch[1], "patch_size": patch[2:]}
        if (head := shape("head.head.weight", 2)) and math.prod(patch[2:]):
            values["out_channels"] = head[0] // math.prod(patch[2:])
    if ffn := shape("blocks.0.ffn.0.weight", 2):
        values["ffn_dim"] = ffn[0]
    if text := shape("text_embedding.0.weight", 2):
        values["text_dim"] = text[1]
    if time := shape("time_embedding.0.weight", 2):
        values["freq_dim"] = time[1]
    layers = [int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))]
    if layers:
        values["num_layers"] = min(max(layers) + 1, len(state))  # one stray key makes no billion layers
    return values


def _read_json(file: Path) -> dict[str, Any]:
    return _parse(file.read_text(encoding="utf-8", errors="replace"), file)


def _parse(text: str, file: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: corrupt, or not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got a {type(values).__name__}")
    return values
