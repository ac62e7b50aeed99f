"""Rollout states as safetensors files.

cache.NAME       KV caches            latents.LEVEL/BLOCK   in flight       history.LEVEL/BLOCK   stored for recaching
text.I           prompt embeddings    metadata              JSON: key, groups_done, step, noise, texts (block -> I),
                                                            sums (tensor -> :func:`checksum`; "" -> of the others)

A byte that has changed in the file since is found when it is read. Files of before 2026-11-28 have no sums.
"""

from __future__ import annotations

import json
import textwrap
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..io.atomic import SPECIAL, atomic, is_special
from ..io.files import refuse_stand_in, save_tensors

TENSORS = ("cache", "latents", "history")
NUMBERS = ("key", "groups_done", "step")


class DamagedFile(ValueError):
    """A file whose bytes are not those that were written."""


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
    """The inverse of :func:`pack`; ValueError for an incomplete or damaged state."""
    state: dict[str, Any] = {name: field(metadata, name, str if name == "key" else int) for name in NUMBERS}
    of_block = field(metadata, "texts", dict)
    state["noise"] = field(metadata, "noise", str) if "noise" in metadata else None  # of states before 2026-11-28
    for kind in TENSORS:
        state[kind] = under(tensors, kind)
    prompts = under(tensors, "text")
    for block, index in of_block.items():
        if not block.isdecimal() or str(index) not in prompts:
            raise ValueError(f"damaged: texts names prompt {index!r} for block {block!r}, which is not there")
    state["prompt_embeds"] = {int(block): prompts[str(index)] for block, index in of_block.items()}
    return state


def field(metadata: Mapping[str, str], name: str, kind: type) -> Any:
    """A JSON value of the metadata: str, dict, or a whole number of at least 0; ValueError of one line otherwise."""
    if name not in metadata:
        raise ValueError(f"not a rollout state of this version: {name} is missing")
    try:
        value = json.loads(metadata[name])
    except ValueError:
        value = None
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        legal = {str: "a string", dict: "an object", int: "a whole number of at least 0"}[kind]
        raise ValueError(f"damaged: {name} must be {legal}, got {textwrap.shorten(metadata[name], 60)!r}")
    return value


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
        save_tensors(tensors, partial, {**metadata, "sums": json.dumps(_sums(tensors, metadata))})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) on the CPU.

    Raises:
        ValueError: the file is missing or cannot be read; :class:`DamagedFile`: it is corrupt.
    """
    metadata = read_metadata(path)
    with _named(path):
        tensors = load_file(path)
    if (stored := metadata.pop("sums", None)) is not None and stored != (now := json.dumps(_sums(tensors, metadata))):
        changed = _first_difference(stored, now)
        raise DamagedFile(f"cannot read {path}: it is damaged: {changed} is not what was written")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Only the metadata; ValueError as :func:`read`."""
    refuse_stand_in(path)
    if path.is_dir() or is_special(path):
        raise ValueError(f"cannot read {path}: it is {'a folder' if path.is_dir() else SPECIAL}")
    with _named(path), safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of reading name the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except safetensors.SafetensorError as error:
        raise DamagedFile(f"cannot read {path}: {error}") from error


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes, eight at a time, modulo 2**64: on any device, and the same on all. One that has
    changed is always noticed. A CRC would see more (words that changed places), at four times the cost on a CPU.

    >>> checksum(torch.tensor([1, 2])), checksum(torch.tensor([1, 3]))
    (3, 4)
    """
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    if data.storage_offset() % 8:  # of a slice
        data = data.clone()
    in_words = data.numel() // 8 * 8
    words, last_bytes = data[:in_words].view(torch.int64), data[in_words:]
    return (int(words.sum()) + int(last_bytes.sum())) % 2**64


def _sums(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, int]:
    of_metadata = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    return {"": of_metadata, **{name: checksum(tensors[name]) for name in sorted(tensors)}}


def _first_difference(stored: str, now: str) -> str:
    """What two JSON objects do not say alike."""
    try:
        before, after = json.loads(stored), json.loads(now)
        return next(name for name in {**after, **before} if before.get(name) != after.get(name)) or "its metadata"
    except (ValueError, AttributeError, StopIteration):
        return "sums"
