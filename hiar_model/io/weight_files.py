"""Weight files: which files a path means, and reading and checking their tensors."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import SPECIAL, is_special
from .files import refuse_stand_in
from .gguf_files import NotReadError, gguf_package, read_gguf

PICKLES, BIN, GGUF = (".pth", ".pt"), ".bin", ".gguf"
INDEX, BIN_INDEX = ".safetensors.index.json", ".bin.index.json"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OTHER_PARTS = ("Wan2.1_VAE", "Wan2.2_VAE", "models_t5", "models_clip", "taew2_1")
"""Beginnings of the names of what lies beside a transformer's weights."""


def weight_files(source: Path) -> list[Path]:
    """The weight files at a path: the file itself, the shards of an index, or the files of a folder, without the text
    encoders and VAEs published beside them.

    Raises:
        ValueError: one line: no such path, another suffix, a bad index, a missing shard, a git-lfs pointer.
    """
    files = _weight_files(source)
    for file in files:
        refuse_stand_in(file)
    return files


def _weight_files(source: Path) -> list[Path]:
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if is_special(source):
        raise ValueError(f"{source}: it is {SPECIAL}")
    if source.is_file():
        if source.name.endswith((INDEX, BIN_INDEX)):
            return _shards(source)
        if source.suffix not in (".safetensors", *PICKLES, BIN, GGUF):
            suffix = source.suffix or "no suffix"
            raise ValueError(f"{source}: expected .safetensors, .pth, .pt, .bin, .gguf or a folder, got {suffix!r}")
        return [source]
    indexes = sorted(source.glob(f"*{INDEX}"))
    if len(indexes) > 1:
        raise ValueError(f"{source}: several indexes ({some(p.name for p in indexes)}); give the path of one")
    for index in indexes:
        one_file = index.with_name(index.name.removesuffix(".index.json"))
        if one_file.is_file() and one_file not in _named_shards(index):  # diffusers leaves an earlier save's index
            only_one([index, one_file], f"the weights of {source}")
        return _shards(index)
    kinds = ((".safetensors",), PICKLES)
    inside = [p for p in sorted(source.iterdir()) if not p.name.startswith((".", *_OTHER_PARTS))]
    of_kind = [files for kind in kinds if (files := [p for p in inside if p.suffix in kind])]
    only_one([files[0] for files in of_kind], f"the weights of {source}")
    if of_kind:
        return of_kind[0]
    if indexes := [p for p in inside if p.name.endswith(BIN_INDEX)]:
        only_one(indexes, f"the weights of {source}")
        return _shards(indexes[0])
    for suffix in (BIN, GGUF):  # of diffusers and PEFT where they write no .safetensors; not beside those
        if files := [p for p in inside if p.suffix == suffix]:
            only_one(files, f"the weights of {source}")
            return files
    inner = sorted(p.name for p in source.iterdir() if p.is_dir() and any(p.glob("*.safetensors")))
    hint = f"; its folders have some: {some(inner)}" if inner else ""
    raise ValueError(
        f"{source}: no weights found; expected *{INDEX}, *.safetensors, *.pth, *.pt, *.bin or *.gguf{hint}"
    )


def _named_shards(index: Path) -> list[Path]:
    """The files that an index names, whether they are there or not."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{index}: no weights found: expected a weight_map from keys to files")
    return [index.parent / name for name in sorted({str(name) for name in mapping.values()})]


def _shards(index: Path) -> list[Path]:
    shards = _named_shards(index)
    for shard in shards:
        if shard.parent != index.parent or not shard.is_file():
            raise ValueError(f"{index}: names the shard {shard.relative_to(index.parent)}, which is not beside it")
    return shards


def read_tensors(file: Path) -> tuple[Any, dict[str, str]]:
    """The contents of one file, memory-mapped where its format allows, and its header.

    ValueError of one line for a file that is missing, truncated, of another format, or a pickle of more than tensors.
    Quantised tensors of a GGUF file are :class:`.Packed`.
    """
    if file.suffix == GGUF:
        gguf_package()
    with _reading(file):
        if file.suffix == GGUF:
            return read_gguf(file)
        if file.suffix == ".safetensors":
            from safetensors import safe_open  # a GPU machine that only measures may lack it

            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)), {}


def tensor_names(file: Path) -> list[str]:
    """The keys of a .safetensors file; ValueError as :func:`read_tensors`."""
    from safetensors import safe_open

    with _reading(file), safe_open(file, framework="pt") as opened:
        return list(opened.keys())


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    refuse_stand_in(file)
    try:
        yield
    except NotReadError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file or directory") from error
    except Exception as error:  # each format and each kind of damage raises another type
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0][:150]
        kinds = {".safetensors": "safetensors", GGUF: "GGUF"}
        kind = kinds.get(file.suffix, "a plain PyTorch state dict (weights_only)")
        what = _mistaken(file) or f"{type(error).__name__}: {reason}"
        raise ValueError(f"{file}: corrupt, or not {kind}: {what}") from error


def _mistaken(file: Path) -> str | None:
    """What an empty file, or one whose first bytes do not belong to its suffix, is."""
    with suppress(OSError), file.open("rb") as opened:
        head = opened.read(9)
        size = file.stat().st_size
        if not size:
            return "it is empty"
        formats = {
            (GGUF,): head.startswith(b"GGUF"),
            PICKLES: head.startswith(b"PK\3\4"),
            (".safetensors",): head[8:] == b"{" and int.from_bytes(head[:8], "little") < size,
        }
        for suffixes, here in formats.items():
            if here and file.suffix not in suffixes:
                return f"it begins as {suffixes[0]} files do: rename it, if it is one"
    return None


def add_tensors(state: dict[str, Any], more: Mapping[str, Any], file: Path, origin: dict[str, Path]) -> None:
    """Add the tensors of one of a model's files to ``state``, and their file to ``origin``; ValueError for a key that
    is there already, naming both files.
    """
    for key, value in more.items():
        if key in state:
            raise ValueError(
                f"{origin[key]} and {file.name} both hold {key}: keep one of the two, or give the path of one"
            )
        state[key], origin[key] = value, file


def only_one(paths: Sequence[Path], what: str) -> None:
    """ValueError if there is more than one candidate for a part of a model."""
    if len(paths) > 1:
        names = " and ".join(str(path) for path in paths)
        raise ValueError(f"two files for {what}: {names}; keep one, or give the path of one")


def check_tensors(state: Mapping[str, Any], source: Path) -> None:
    """ValueError that names the first value that is not a floating-point tensor."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{source}: {name} is a {type(value).__name__}, expected a tensor")
        if value.dtype not in DTYPES:
            raise ValueError(f"{source}: {name} is {value.dtype}, expected one of {', '.join(map(str, DTYPES))}")


def renamed(state: Mapping[str, Any], rename: Callable[[str], str], source: Path) -> dict[str, Any]:
    """The same values under renamed keys; ValueError if two keys become one."""
    result: dict[str, Any] = {}
    for key, value in state.items():
        if (name := rename(key)) in result:
            raise ValueError(f"{source}: {key} is there twice (as {name}); expected every tensor once")
        result[name] = value
    return result


def check_keys(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path, spell: Callable[[str], str] | None = None
) -> None:
    """ValueError of one line unless ``state`` has exactly the expected keys and shapes.

    Args:
        spell: key -> its name in the file, for the error; None: the same.
    """
    problems = []
    for what, keys in (
        ("missing", [key for key in expected if key not in state]),
        ("unexpected", [key for key in state if key not in expected]),
    ):
        if keys:
            names = some(map(spell, keys) if spell else keys)
            problems.append(f"{len(keys)} {what} {'key' if len(keys) == 1 else 'keys'} ({names})")
    for key, tensor in expected.items():
        if key in state and state[key].shape != tensor.shape:
            name = spell(key) if spell else key
            problems.append(f"wrong shape: {name} is {list(state[key].shape)}, expected {list(tensor.shape)}")
            break
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names, for an error."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError of one line for anything else."""
    refuse_stand_in(file)
    try:
        return parse_json(file.read_text(encoding="utf-8-sig", errors="replace"), file)
    except OSError as error:
        raise ValueError(f"{file}: {(error.strerror or str(error)).lower()}") from error


def parse_json(text: str, file: Path) -> dict[str, Any]:
    """The object in a JSON text; ``file`` is named in errors."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: corrupt, or not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got a {type(values).__name__}")
    return values
