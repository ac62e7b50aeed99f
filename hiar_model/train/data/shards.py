"""Folders that any number of processes fill with shards, and go on with: what is said beside them, what is missing.

    settings.json      what is being made; a run with other settings is refused
    shard-00003.*      samples 3 * shard_size and following, made by process 3 % processes

Files have a temporary name until they are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...io.files import refuse_stand_in

SETTINGS = "settings.json"


def shard_name(number: int) -> str:
    """Of its files, without a suffix."""
    return f"shard-{number:05d}"


def shard_rows(count: int, shard_size: int) -> list[range]:
    """The samples of every shard."""
    return [range(first, min(first + shard_size, count)) for first in range(0, count, shard_size)]


def agree(folder: Path, settings: Mapping[str, Any], what: str, rank: int) -> None:
    """Write the settings, or compare with those that are there.

    Raises:
        ValueError: they differ, each by its name; ``what``: the samples, for the message.
    """
    path = folder / SETTINGS
    if not path.exists():
        write_json(path, settings, rank)
        return
    found = read_json(path)
    differ = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
    if differ:
        told = "; ".join(f"{key} was {found.get(key)!r}, now it is {settings.get(key)!r}" for key in differ)
        raise ValueError(f"{folder} holds {what} made with other settings: {told}; choose another folder")


def unfinished(folder: Path, suffix: str, finished: bool | None = None) -> str | None:
    """What to say of a folder whose shards are not all there; None if they are, or if it has no settings of ours.

    Args:
        suffix: of the file that is there once a shard is whole. finished: whether they are all there; None: look.
    """
    if not (folder / SETTINGS).exists():
        return None
    settings = read_json(folder / SETTINGS)
    count, size = settings.get("count"), settings.get("shard_size")
    if not isinstance(count, int) or not isinstance(size, int):
        return None  # somebody else's file
    shards = len(shard_rows(count, size))
    there = sum((folder / f"{shard_name(n)}{suffix}").exists() for n in range(shards))
    if there == shards if finished is None else finished:
        return None
    return f"{folder}: unfinished, {there} of {shards} shards are there: the command that made them goes on"


def shared_out(folder: Path, what: str, suffix: str) -> str:
    """What a process says once its own shards are there."""
    others = "" if unfinished(folder, suffix) is None else "; other processes still make theirs"
    return f"{what}: {folder}{others}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError of one line if there is none."""
    refuse_stand_in(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any], rank: int) -> None:
    """As :func:`write`."""
    write(path, (json.dumps(values, indent=2) + "\n").encode(), rank)


def write(path: Path, blob: bytes, rank: int) -> None:
    """The file appears whole or not at all; several ranks may write the same one.

    Raises:
        OSError: it cannot be written; what to do is said.
    """
    partial = path.with_name(f".{path.name}.rank_{rank}.partial")
    try:
        with partial.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; whole shards are kept, run again to go on", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
