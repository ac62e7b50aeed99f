"""Files of weights: which ones a path means, what they hold, and how a new one appears whole or not at all."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import refuse_stand_in, temporary

PICKLES = (".pth", ".pt")
INDEX = ".safetensors.index.json"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OTHER_PARTS = ("Wan2.1_VAE", "Wan2.2_VAE", "models_t5", "models_clip")  # published beside a transformer's weights


def weight_files(source: Path) -> list[Path]:
    """The files that a path means: itself, the shards of an index, or those of a folder; text encoders and VAEs that
    are published in the same folder are not among them.

    Raises:
        ValueError: one line: nothing there, another suffix, a bad index, a shard that is missing, a git-lfs pointer.
    """
    files = _weight_files(source)
    for file in files:
        refuse_stand_in(file)
    return files


def _weight_files(source: Path) -> list[Path]:
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_file():
        if source.name.endswith(INDEX):
            return _shards(source)
        if source.suffix not in (".safetensors", *PICKLES):
            found = source.suffix or "no suffix"
            raise ValueError(f"{source}: expected .safetensors, .pth, .pt or a folder, got {found!r}")
        return [source]
    indexes = sorted(source.glob(f"*{INDEX}"))
    if len(indexes) > 1:
        raise ValueError(f"{source}: several indexes ({some(p.name for p in indexes)}); give the path of one")
    if indexes:
        return _shards(indexes[0])
    kinds = ((".safetensors",), PICKLES)
    inside = [p for p in sorted(source.iterdir()) if not p.name.startswith((".", *_OTHER_PARTS))]
    of_kind = [files for kind in kinds if (files := [p for p in inside if p.suffix in kind])]
    only_one([files[0] for files in of_kind], f"the weights of {source}")
    if of_kind:
        return of_kind[0]
    inner = sorted(p.name for p in source.iterdir() if p.is_dir() and any(p.glob("*.safetensors")))
    hint = f"; the folders in it hold some: {some(inner)}" if inner else ""
    raise ValueError(f"{source}: no weights found; expected *{INDEX}, *.safetensors, *.pth or *.pt{hint}")


def _shards(index: Path) -> list[Path]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{index}: no weights found: expected a weight_map from keys to files")
    names = sorted({str(name) for name in mapping.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index}: names the shard {name}, which is not beside it")
    return [index.parent / name for name in names]


def read_tensors(file: Path) -> tuple[Any, dict[str, str]]:
    """What one file holds, mapped into memory where its format allows, and its header; ValueError of one line for
    a file that is torn, of another format, or a pickle of more than tensors.
    """
    refuse_stand_in(file)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)), {}
    except Exception as error:  # each format and each kind of damage raises another type
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0][:150]
        kind = "safetensors" if file.suffix == ".safetensors" else "a plain PyTorch state dict (weights_only)"
        raise ValueError(f"{file}: corrupt, or not {kind}: {type(error).__name__}: {reason}") from error


def add_tensors(state: dict[str, Any], more: Mapping[str, Any], file: Path, came: dict[str, Path]) -> None:
    """Put the tensors of one of several files that make a model together into ``state``.

    Args:
        came: key -> the file that it came from; grows along.

    Raises:
        ValueError: a key is there already: two files for one role, both named.
    """
    for key, value in more.items():
        if key in state:
            raise ValueError(
                f"{came[key]} and {file.name} both hold {key}: keep one of the two, or give the path of one"
            )
        state[key], came[key] = value, file


def only_one(there: Sequence[Path], what: str) -> None:
    """ValueError if more than one of the places that may hold a part of a model does."""
    if len(there) > 1:
        names = " and ".join(str(path) for path in there)
        raise ValueError(f"two files for {what}: {names}; keep one, or give the path of one")


def check_tensors(state: Mapping[str, Any], source: Path) -> None:
    """ValueError that names the first value that is no tensor of a floating-point type."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{source}: {name} is a {type(value).__name__}, expected a tensor")
        if value.dtype not in DTYPES:
            raise ValueError(f"{source}: {name} is {value.dtype}, expected one of {', '.join(map(str, DTYPES))}")


def renamed(state: Mapping[str, Any], rename: Callable[[str], str], source: Path) -> dict[str, Any]:
    """The same values under other keys; ValueError if two keys become one."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if (name := rename(key)) in found:
            raise ValueError(f"{source}: {key} is there twice (as {name}); expected every tensor once")
        found[name] = value
    return found


def check_keys(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path, spell: Callable[[str], str] | None = None
) -> None:
    """ValueError of one line unless exactly the expected keys are there, with their shapes.

    Args:
        spell: makes the file's own name of a key, for the error; None: they are the same.
    """
    problems = []
    for what, keys in (
        ("missing", [key for key in expected if key not in state]),
        ("unexpected", [key for key in state if key not in expected]),
    ):
        if keys:
            told = some(map(spell, keys) if spell else keys)
            problems.append(f"{len(keys)} {what} {'key' if len(keys) == 1 else 'keys'} ({told})")
    for key, want in expected.items():
        if key in state and state[key].shape != want.shape:
            name = spell(key) if spell else key
            problems.append(f"wrong shape: {name} is {list(state[key].shape)}, expected {list(want.shape)}")
            break
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A temporary name of the same suffix in the same folder; it becomes the target's if all goes well, and else leaves
    nothing.

    Raises:
        OSError: one line, also where a library reports a full disk in its own way.
    """
    part = temporary(target, f".part{target.suffix}")
    try:
        yield part
        part.replace(target)
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{target} is not written: {str(error).splitlines()[0]}") from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few, for an error line."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError of one line for anything else."""
    refuse_stand_in(file)
    return parse_json(file.read_text(encoding="utf-8", errors="replace"), file)


def parse_json(text: str, file: Path) -> dict[str, Any]:
    """The object in a JSON text that stands in ``file``."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: corrupt, or not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got a {type(values).__name__}")
    return values
