"""Rollout states as safetensors files.

cache.NAME       KV caches            latents.LEVEL/BLOCK   in flight       history.LEVEL/BLOCK   stored for recaching
text.I           prompt embeddings    metadata              JSON: key, groups_done, step, noise, texts (block -> I)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from ..io.atomic import atomic
from ..io.files import refuse_stand_in, save_tensors

TENSORS = ("cache", "latents", "history")
NUMBERS = ("key", "groups_done", "step")


def pack(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of :meth:`Rollout.state_dict`; a prompt of several blocks is stored once."""
    tensors = {f"{kind}.{name}": x for kind in TENSORS for name, x in state[kind].items()}
    prompts: list[Tensor] = []
    of_block: dict[int, int] = {}
    for block, prompt in state["prompt_embeds"].items():
        index = next((i for i, other in enumerate(prompts) if other is prompt), len(prompts))
        prompts += [prompt] if index == len(prompts) else []
        of_block[block] = index
    tensors |= {f"text.{i}": prompt.clone() for i, prompt in enumerate(prompts)}  # slices of one tensor cannot be saved
    metadata = {name: json.dumps(state[name]) for name in (*NUMBERS, "noise")} | {"texts": json.dumps(of_block)}
    return tensors, metadata


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of :func:`pack`; ValueError for an incomplete state."""
    missing = [name for name in (*NUMBERS, "texts") if name not in metadata]
    if missing:
        raise ValueError(f"not a rollout state of this version: {missing[0]} is missing")
    state: dict[str, Any] = {name: json.loads(metadata[name]) for name in NUMBERS}
    state["noise"] = json.loads(metadata.get("noise", "null"))  # states from before 2026-11-28 name none
    for kind in TENSORS:
        state[kind] = under(tensors, kind)
    of_block = json.loads(metadata["texts"])
    state["prompt_embeds"] = {int(block): tensors[f"text.{index}"] for block, index in of_block.items()}
    return state


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named prefix.NAME, by NAME."""
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically.

    Raises:
        OSError: one line: it cannot be written.
    """
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    with atomic(path) as partial:
        save_tensors(tensors, partial, metadata)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) on the CPU.

    Raises:
        ValueError: the file is missing or corrupt.
    """
    refuse_stand_in(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
