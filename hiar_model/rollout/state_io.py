"""States of rollouts as safetensors files: what is in one, and how it gets onto disk whole or not at all.

cache.NAME       the rings            latents.LEVEL/BLOCK   in flight       history.LEVEL/BLOCK   kept to cache again
text.I           texts in use         metadata              JSON: key, groups_done, step, texts (block -> I)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..io.atomic import atomic
from ..io.files import refuse_stand_in

TENSORS = ("cache", "latents", "history")
NUMBERS = ("key", "groups_done", "step")


def pack(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of what :meth:`Rollout.state_dict` returned; a text that serves many blocks is there once."""
    tensors = {f"{kind}.{name}": x for kind in TENSORS for name, x in state[kind].items()}
    texts: list[Tensor] = []
    of_block: dict[int, int] = {}
    for block, text in state["texts"].items():
        place = next((i for i, other in enumerate(texts) if other is text), len(texts))
        texts += [text] if place == len(texts) else []
        of_block[block] = place
    tensors |= {f"text.{i}": text.clone() for i, text in enumerate(texts)}  # slices of one tensor cannot be saved
    told = {name: json.dumps(state[name]) for name in (*NUMBERS, "noise")} | {"texts": json.dumps(of_block)}
    return tensors, told


def unpack(tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> dict[str, Any]:
    """What :func:`pack` was given; ValueError for what is no whole state."""
    missing = [name for name in (*NUMBERS, "texts") if name not in told]
    if missing:
        raise ValueError(f"no state of a rollout that this version wrote: {missing[0]} is missing")
    state: dict[str, Any] = {name: json.loads(told[name]) for name in NUMBERS}
    state["noise"] = json.loads(told.get("noise", "null"))  # states of before 2026-11-28 name none
    for kind in TENSORS:
        state[kind] = under(tensors, kind)
    texts = json.loads(told["texts"])
    state["texts"] = {int(block): tensors[f"text.{place}"] for block, place in texts.items()}
    return state


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those named prefix.NAME, by NAME."""
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def write(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    """Write atomically.

    Raises:
        OSError: one line: it cannot be written.
    """
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    with atomic(path) as partial:
        save_file(tensors, partial, metadata=dict(told))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) on the CPU.

    Raises:
        ValueError: the file is not there, or corrupt.
    """
    refuse_stand_in(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            told = file.metadata() or {}
        return load_file(path), told
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
