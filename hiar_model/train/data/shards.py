"""Folders of shards that any number of processes write together, and resume.

    settings.json      how the shards are made; a run with other settings is refused
    shard-00003.*      samples 3 * shard_size and following, made by process 3 % processes

Files are written atomically through a temporary name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...io.atomic import behind_links, discard, publish
from ...io.weight_files import read_json

SETTINGS = "settings.json"


def shard_name(number: int) -> str:
    """Stem of a shard's files."""
    return f"shard-{number:05d}"


def shard_samples(count: int, shard_size: int) -> list[range]:
    """The samples of every shard."""
    return [range(first, min(first + shard_size, count)) for first in range(0, count, shard_size)]


def write_or_check_settings(folder: Path, settings: Mapping[str, Any], what: str, rank: int) -> None:
    """Write the settings, or compare them with the file's.

    Raises:
        ValueError: they differ; names each with both values. There are shards, but no settings of them, which would be
            taken for shards of these. ``what``: the kind of samples, for the message.
    """
    path = folder / SETTINGS
    if not path.exists():
        if any(folder.glob("shard-*.safetensors")):
            lost = f"{folder} holds shards of {what} but no {SETTINGS}, which says how they were made"
            raise ValueError(f"{lost}: copy it there, or choose another folder")
        write_json(path, settings, rank)
        return
    stored = read_json(path)
    differ = [key for key in {**stored, **settings} if stored.get(key) != settings.get(key)]
    if differ:
        changes = "; ".join(f"{key} was {stored.get(key)!r}, now it is {settings.get(key)!r}" for key in differ)
        raise ValueError(f"{folder} holds {what} made with other settings: {changes}; choose another folder")


def unfinished(folder: Path, suffix: str, finished: bool | None = None) -> str | None:
    """A message for a folder with missing shards; None if it has all of them, or no settings of ours.

    Args:
        suffix: of the file that is written last of each shard. finished: whether all shards exist; None: look.
    """
    if not (folder / SETTINGS).exists():
        return None
    settings = read_json(folder / SETTINGS)
    count, size = settings.get("count"), settings.get("shard_size")
    if not isinstance(count, int) or not isinstance(size, int):
        return None  # somebody else's file
    shards = len(shard_samples(count, size))
    present = sum((folder / f"{shard_name(n)}{suffix}").exists() for n in range(shards))
    if present == shards if finished is None else finished:
        return None
    return f"{folder}: unfinished, {present} of {shards} shards exist; run the command that made them again"


def progress_report(folder: Path, what: str, suffix: str) -> str:
    """A line for the user once this process has written its shards."""
    others = "" if unfinished(folder, suffix) is None else "; other processes still write theirs"
    return f"{what}: {folder}{others}"


def write_json(path: Path, values: Mapping[str, Any], rank: int) -> None:
    """As :func:`write`."""
    write(path, (json.dumps(values, indent=2) + "\n").encode(), rank)


def write(path: Path, blob: bytes, rank: int) -> None:
    """Write atomically through a temporary file; several ranks may write the same one.

    Raises:
        OSError: the file cannot be written.
    """
    file = behind_links(path)
    partial = file.with_name(f".{file.name}.rank_{rank}.partial")  # ranks on several machines may have one process id
    try:
        partial.write_bytes(blob)
        publish(partial, path)
    except OSError as error:
        reason = f"{error.strerror}; finished shards are kept, run again to resume"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        discard(partial)
