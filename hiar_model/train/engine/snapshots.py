"""Saved states of a run: torch.distributed.checkpoint folders, each written atomically.

A state is written under a temporary name, synced and renamed; only then is the one before it deleted. So the last good
state survives a kill at any moment and a full disk. Tensors may be sharded; another number of ranks can read them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException

from .distributed import is_first

ABOUT = "about.json"
_NAME = re.compile(r"update_(\d{8})")


class Snapshots:
    """The states of one run, in ``folder``; every rank must make each call.

    about.json of a state holds its recipe, counters and pending metrics.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first = is_first()

    def newest(self) -> Path | None:
        """The last good state."""
        if not self.folder.is_dir():
            return None
        return max((p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)), default=None, key=lambda p: p.name)

    def about(self, state: Path) -> dict[str, Any]:
        """The content of a state's about.json.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            return json.loads((state / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{state / ABOUT} cannot be read: {error}; delete {state} to go on without it") from error

    def load(self, state: Path, state_dict: dict[str, Any]) -> None:
        """Read a state into the tensors of ``state_dict``, in place.

        Raises:
            ValueError: a tensor is missing, of another shape, or not readable.
        """
        try:
            with _quietly():
                load(state_dict, storage_reader=FileSystemReader(state), no_dist=not dist.is_initialized())
        except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{state} cannot be read: {_reason(error)}") from error

    def save(self, update: int, state_dict: dict[str, Any], about: dict[str, Any]) -> Path:
        """Write the state after ``update`` updates, then delete the others; returns its folder.

        Raises:
            OSError: the disk is full or not writable; this state is removed, and the last good one is kept.
        """
        state = self.folder / f"update_{update:08d}"
        partial = self.folder / f".{state.name}.partial"
        last = self.newest()
        if self.first:
            shutil.rmtree(partial, ignore_errors=True)
        self._wait()
        try:
            partial.mkdir(parents=True, exist_ok=True)
            # Files are synced by the writer.
            with _quietly():
                save(state_dict, storage_writer=FileSystemWriter(partial), no_dist=not dist.is_initialized())
            self._publish(partial, state, about)
        except (CheckpointException, OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            good = f"the last good one is {last}" if last else "there is no earlier one"
            raise OSError(f"{state} cannot be written: {_reason(error)}; {good}") from error
        if self.first:
            for other in self.folder.iterdir():
                if other != state:
                    shutil.rmtree(other, ignore_errors=True)
        return state

    def _publish(self, partial: Path, state: Path, about: dict[str, Any]) -> None:
        """The first rank renames; all ranks raise what it raises."""
        failed: list[OSError | None] = [None]
        if self.first:
            try:
                self._rename(partial, state, about)
            except OSError as error:
                failed = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(failed)
        if failed[0] is not None:
            raise failed[0]

    def _rename(self, partial: Path, state: Path, about: dict[str, Any]) -> None:
        with (partial / ABOUT).open("w", encoding="utf-8") as file:
            json.dump(about, file)
            file.flush()
            os.fsync(file.fileno())
        _sync(partial)
        shutil.rmtree(state, ignore_errors=True)
        partial.rename(state)
        _sync(self.folder)

    def _wait(self) -> None:
        if dist.is_initialized():
            dist.barrier()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _causes(error: BaseException) -> list[BaseException]:
    """The error and its causes, with the failures of all ranks."""
    causes: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or one in causes:
            continue
        causes.append(one)
        todo += [one.__cause__, one.__context__]
        if isinstance(one, CheckpointException):
            todo += [failure[0] for failure in one.failures.values()]
    return causes


def _reason(error: BaseException) -> str:
    """One line: the deepest reason."""
    causes = _causes(error)
    reason = next((e for e in causes if isinstance(e, OSError)), causes[-1])
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0]
