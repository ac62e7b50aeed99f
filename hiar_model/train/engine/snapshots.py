"""Saved states of a run: torch.distributed.checkpoint folders, each written atomically.

A state is written under a temporary name, synced and renamed; only then is the one before it deleted. So the last good
state survives a kill at any moment and a full disk. Tensors may be sharded; another number of ranks can read them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from ...common.checks import out_of_memory
from ...io.atomic import sync
from .checksums import checksums
from .distributed import is_first

ABOUT, CONTENTS = "about.json", ".metadata"  # ours, and torch's
_NAME = re.compile(r"update_(\d{8})")
_OURS = re.compile(r"\.?update_\d{8}(\.partial)?")


class Snapshots:
    """The states of one run, in ``folder``; every rank must make each call.

    about.json of a state holds its recipe, counters and pending metrics, and the :func:`.checksums` of its tensors.
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
            ValueError: it cannot be read, or is that of no state of this name.
        """
        try:
            about = json.loads((state / ABOUT).read_text(encoding="utf-8"))
            if wrong := _wrong(about, int(state.name.rpartition("_")[2])):
                raise ValueError(wrong)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{state / ABOUT} cannot be read: {reason}; {_advice(error, state)}") from error
        return about

    def load(self, state: Path, state_dict: dict[str, Any]) -> None:
        """Read a state into the tensors of ``state_dict``, in place.

        Raises:
            ValueError: a tensor is missing, of another shape, not readable, or not what was written.
            RuntimeError, MemoryError, KeyboardInterrupt: missing memory and Ctrl-C, which say nothing of the state.
        """
        try:
            _contents(state / CONTENTS)
            with _quietly():
                alone = not dist.is_initialized()
                load(state_dict, storage_reader=FileSystemReader(state), planner=_PlainPlanner(), no_dist=alone)
            stored = self.about(state).get("sums", {})  # states of before 2026-11-28 have none
            sums = checksums(state_dict)
            if changed := [name for name, value in stored.items() if sums.get(name) != value]:
                raise ValueError(f"it is damaged: {changed[0]} is not what was written")
        except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
            _raise_interrupt(error)
            _raise_missing_memory(error)
            advice = _advice(_deepest(error), state)
            raise ValueError(f"{state} cannot be read: {_reason(error)}; {advice}") from error

    def save(self, update: int, state_dict: dict[str, Any], about: dict[str, Any]) -> Path:
        """Write the state after ``update`` updates, then delete the others; returns its folder.

        Raises:
            OSError: the disk is full or not writable, or the processes write to several; this state is removed, and the
                last good one is kept.
        """
        state = self.folder / f"update_{update:08d}"
        partial = self.folder / f".{state.name}.partial"
        last = self.newest()
        if self.first:
            shutil.rmtree(partial, ignore_errors=True)
        self._wait()
        about = {**about, "sums": checksums(state_dict)}
        try:
            partial.mkdir(parents=True, exist_ok=True)
            # Files are synced by the writer.
            with _quietly():
                save(state_dict, storage_writer=FileSystemWriter(partial), no_dist=not dist.is_initialized())
            self._publish(partial, state, about)
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            _raise_interrupt(error)
            good = f"the last good one is {last}" if last else "there is no earlier one"
            raise OSError(f"{state} cannot be written: {_reason(error)}; {good}") from error
        if self.first:
            for other in self.folder.iterdir():
                if other != state and _OURS.fullmatch(other.name):  # what a person put there stays
                    shutil.rmtree(other, ignore_errors=True)
        return state

    def _publish(self, partial: Path, state: Path, about: dict[str, Any]) -> None:
        """The first rank renames; all ranks raise what it raises."""
        failed: list[OSError | ValueError | None] = [None]
        if self.first:
            try:
                self._rename(partial, state, about)
            except (OSError, ValueError) as error:
                failed = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(failed)
        if failed[0] is not None:
            raise failed[0]

    def _rename(self, partial: Path, state: Path, about: dict[str, Any]) -> None:
        files = {one.relative_path for one in _contents(partial / CONTENTS).storage_data.values()}
        if missing := sorted(name for name in files if not (partial / name).is_file()):
            raise OSError(f"{missing[0]} of another process is not there: all must see the same file system")
        with (partial / ABOUT).open("w", encoding="utf-8") as file:
            json.dump(about, file)
            file.flush()
            os.fsync(file.fileno())
        sync(partial)
        shutil.rmtree(state, ignore_errors=True)
        partial.rename(state)
        sync(self.folder)

    def _wait(self) -> None:
        if dist.is_initialized():
            dist.barrier()


def _wrong(about: Any, update: int) -> str:
    """What is not as :meth:`Snapshots.save` writes it, or ""."""
    if not isinstance(about, dict) or not isinstance(about.get("recipe"), dict):
        return "it holds no recipe"
    if (written := about.get("update")) != update:
        return f"update is {written!r}, the folder's name says {update}"
    pending = about.get("pending")
    if not isinstance(pending, list) or not all(isinstance(metrics, dict) for metrics in pending):
        return "pending is no list of metrics"
    for key in ("inputs", "execution"):  # which older states do not have
        if not isinstance(about.get(key, {}), dict):
            return f"{key} is no mapping"
    return ""


class _Contents(pickle.Unpickler):
    """Reads torch's table of contents, and nothing else that a pickle may call: a state may come from anywhere."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name; UnpicklingError for any that no table needs."""
        plain = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not plain and name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{CONTENTS} names {module}.{name}, which no state needs: do not trust it")
        return super().find_class(module, name)


_TABLE = ("Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata",
          "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")  # fmt: skip
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_CLASSES: dict[str, tuple[str, ...]] = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": _TABLE,
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    **dict.fromkeys(("pathlib", "pathlib._local"), _PATHS),  # as of Python 3.13
}


def _contents(file: Path) -> Metadata:
    """The table of contents; ValueError of one line unless the file is one and no more."""
    try:
        with file.open("rb") as opened:
            table = _Contents(opened).load()
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle raise anything
        raise ValueError(f"{str(error) or type(error).__name__} ({CONTENTS})") from error
    if not isinstance(table, Metadata):
        raise ValueError(f"{CONTENTS} is no table of contents")
    return table


class _PlainPlanner(DefaultLoadPlanner):
    """Loads what is no tensor only if it is plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """ValueError for anything else."""
        plain = True
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError:  # whose advice is to trust it
            plain = False
        if not plain:
            name = read_item.dest_index.fqn
            raise ValueError(f"{name} is more than plain data, which no state needs: do not trust it")
        value.seek(0)
        super().load_bytes(read_item, value)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


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


def _raise_interrupt(error: BaseException) -> None:
    """Ctrl-C, which torch turns into an error of the state."""
    if any(isinstance(cause, KeyboardInterrupt) for cause in _causes(error)):
        raise KeyboardInterrupt from error


def _raise_missing_memory(error: BaseException) -> None:
    """As it is: nobody shall delete a good state for it."""
    for cause in _causes(error):
        if not isinstance(cause, CheckpointException) and out_of_memory(cause) is not None:
            raise cause


def _deepest(error: BaseException) -> BaseException:
    causes = _causes(error)
    return next((e for e in causes if isinstance(e, OSError)), causes[-1])


def _advice(error: BaseException, state: Path) -> str:
    """What to do about a state that cannot be read: only one that is damaged may be deleted."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return f"{state} may be good: make it readable and run the same command again"
    return f"delete {state} to go on without it, or copy it again"


def _reason(error: BaseException) -> str:
    """One line: the deepest reason."""
    reason = _deepest(error)
    if isinstance(reason, OSError) and reason.strerror:
        missing = isinstance(reason, FileNotFoundError) and reason.filename
        return f"{reason.strerror}: {Path(reason.filename).name}" if missing else reason.strerror
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0]
