"""`hiar convert`: one transformer from any layout into any other, with the proof that no number changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ..common.checks import dtype_name, path_like
from ..common.lora_file import LoraLike, lora_files
from ..config import SHIPPED, WanConfig
from ..io.atomic import publish, unpublished, unused
from ..io.files import check_output, in_folder, output_path, save_tensors
from . import key_mapping
from .checkpoint import (
    CONFIG_KEY,
    CheckpointInfo,
    file_header,
    full_tensors,
    open_checkpoint,
    read_checkpoint,
    toy_sizes,
)
from .lora import read_loras

TARGETS = ("native", "diffusers", "pt")
_WEIGHTS, _SIZES = "diffusion_pytorch_model.safetensors", "config.json"


@dataclass(frozen=True)
class Converted:
    """What was read, what was written (as read back) and where, and the SHA-256 of the tensors of both."""

    source: CheckpointInfo
    target: CheckpointInfo
    path: Path
    sha256: str


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over all tensors of a transformer, hexadecimal: the same in every layout, file split and order.

    Args:
        state: native keys -> tensors (q, k, v apart), as :func:`.checkpoint.read_checkpoint` gives them. In
            the order of the sorted keys, each adds ``key dtype [shape]`` as a line of text and its bytes, row by row.
    """
    digest = TensorsDigest()
    for key in sorted(state):
        digest.add(key, state[key])
    return digest.hexdigest()


class TensorsDigest:
    """:func:`tensors_sha256` of tensors that come one by one, by sorted keys."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, key: str, tensor: Tensor) -> None:
        """The next tensor."""
        value = tensor.detach().cpu().contiguous()
        self._hash.update(f"{key} {dtype_name(value.dtype)} {list(value.shape)}\n".encode())
        self._hash.update(value.flatten().view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Hexadecimal."""
        return self._hash.hexdigest()


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    on_checkpoint: Callable[[CheckpointInfo, str], None] | None = None,
    *,
    lora: LoraLike | Sequence[LoraLike] | None = None,
    on_lora: Callable[[str], None] | None = None,
    on_open: Callable[[CheckpointInfo], None] | None = None,
) -> Converted:
    """Write a transformer in another layout; every tensor keeps its dtype, and its numbers unless LoRA is merged.
    Quantised tensors (:mod:`.quantised`) are dequantised, to bfloat16.

    The result is written atomically, and read back and compared (hash of the tensors, every size) before the rename.
    Existing files are never overwritten: where another process has written ``target`` meanwhile, this result is
    name-2.

    Args:
        source: whatever :func:`hiar_model.load_transformer` reads.
        target: the new folder (``to`` "native" or "diffusers"), .safetensors file ("native") or .pt file ("pt").
        to: "native": published Wan keys, as the folder of Wan2.1-T2V or as one file; "diffusers": what
            ``WanTransformer3DModel.from_pretrained`` loads, the folder ``transformer`` of a pipeline; "pt": a training
            file as Self-Forcing and HiAR write it, {"generator": {"model.<native key>": tensor}}, with the sizes added.
        on_checkpoint: called with the source's description and the hash of its tensors (with LoRA merged) before
            anything is written.
        lora: LoRA files to merge (:data:`.LoraLike`). on_lora: called with a line about each.
        on_open: called with the source's description before weights are read; may refuse it with ValueError.

    Raises:
        ValueError: one line: an unknown layout, a name that does not fit it, a target that exists or lies in the
            source, a source that cannot be read, a size that the layout has no name for, a round trip that changed
            something.
        OSError: one line: the target cannot be written.
    """
    path_like("source", source)
    target = _check_target(output_path(target), to)
    if Path(source).is_dir() and Path(os.path.realpath(source)) in Path(os.path.realpath(target)).parents:
        raise ValueError(f"{target} would lie in {source} and become part of it: choose a place outside")
    state, info = open_checkpoint(source)
    if on_open is not None:
        on_open(info)
    if to == "diffusers":
        try:
            key_mapping.diffusers_config(info.config)
        except ValueError as error:  # before computing the hash
            raise ValueError(f"{source}: {error}") from error
    loras, _, notes = read_loras(lora_files(lora), state)
    for note in notes:
        if on_lora is not None:
            on_lora(note)
    state = full_tensors(state, info, source, loras)
    before = tensors_sha256(state)
    if on_checkpoint is not None:
        on_checkpoint(info, before)
    with unpublished(target) as partial:
        _write(state, info, partial, to)
        again, written = read_checkpoint(partial)
        after = tensors_sha256(again)
        if after != before:
            raise ValueError(f"{target} is not written: its tensors hash to {after}, those of {source} to {before}")
        for name in (f.name for f in fields(WanConfig)):
            if (new := getattr(written.config, name)) != (old := getattr(info.config, name)):
                raise ValueError(f"{target} is not written: it says {name} {new}, {source} says {old}")
        path = unused(target, overwrite=False)
        publish(partial, path)
    files = tuple(path if file == partial else path / file.relative_to(partial) for file in written.files)
    return Converted(info, replace(written, files=files), path, before)


def _check_target(target: Path, to: str) -> Path:
    if to not in TARGETS:
        raise ValueError(f"unknown layout {to!r}; legal: {', '.join(TARGETS)}")
    legal = {"native": ("", ".safetensors"), "diffusers": ("",), "pt": (".pt", ".pth")}[to]
    files = (".safetensors", ".pt", ".pth", ".gguf", ".bin", ".ckpt")
    # Any other suffix belongs to the name of a folder, such as Wan2.1.
    suffix = target.suffix if target.suffix in files else ""
    if suffix not in legal:
        names = " or ".join(f"name{ending}" if ending else "a folder" for ending in legal)
        raise ValueError(f"{target}: --to {to} writes {names}")
    if str(target) in SHIPPED:
        raise ValueError(f"{target} is the name of a shipped model, which --model {target} means: choose another name")
    if os.path.exists(target) and not (target.is_dir() and not suffix and not any(target.iterdir())):
        raise ValueError(f"{target} exists and is not overwritten; choose another name")
    check_output(in_folder(target, _SIZES))
    if suffix and toy_sizes(target) is not None:
        raise ValueError(f"{target}: {target.parent} is the folder of a toy model: choose a place outside")
    return target


def _write(state: Mapping[str, Tensor], info: CheckpointInfo, partial: Path, to: str) -> None:
    config = info.config
    state = {key: value.contiguous() for key, value in state.items()}
    if to == "pt":
        network = {f"model.{key}": value for key, value in state.items()}
        torch.save({"generator": network, CONFIG_KEY: json.dumps(config.to_dict())}, partial)
    elif partial.suffix == ".safetensors":
        save_tensors(state, partial, file_header(config))
    else:  # a folder whose sizes stand in config.json alone, as in the published ones
        sizes = key_mapping.native_config(config, info.window)
        if to == "diffusers":
            sizes = key_mapping.diffusers_config(config)
            state = {key_mapping.to_diffusers(key): value for key, value in state.items()}
        partial.mkdir()
        save_tensors(state, partial / _WEIGHTS, {"format": "pt"})
        (partial / _SIZES).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
