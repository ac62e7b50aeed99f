"""States of live videos on disk: a way back for models whose states memory has no room for, and the place where a
restarted server goes on.

A file for each, whose name tells its block, the last block that had begun, and a hash of the prompts up to that one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..io.atomic import discard
from ..rollout import state_io

if TYPE_CHECKING:
    from .metrics import Metrics

log = logging.getLogger("hiar.serve")

EVERY = 10
"""Blocks between two states of a session, at least."""
RATE = 25e6
"""Bytes a second that all sessions write together, at most, on average."""
NAME = re.compile(r"(\d+)_(\d+)_([0-9a-f]{16})\.safetensors")


def least_useful(blocks: Sequence[int]) -> int:
    """Which of several states, by their blocks in rising order, to drop: the one whose loss lengthens a way back the
    least, compared with how old it is. Never the last, unless it is the only one.

    >>> least_useful([10, 20, 90, 100])
    0
    """
    if len(blocks) == 1:
        return 0
    ends = [0, *blocks]
    return min(range(len(blocks) - 1), key=lambda i: (ends[i + 2] - ends[i]) / (ends[-1] + 1 - ends[i + 1]))


def prompts_key(changes: Iterable[tuple[int, str]], started: int) -> str:
    """A hash of the prompts of all blocks up to ``started``; changes: (first block, prompt)."""
    text = json.dumps([change for change in changes if change[0] <= started])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(eq=False)
class StateFile:
    """A state before ``block``, when ``started`` was the last block that had begun. written: it is on the disk."""

    path: Path
    block: int
    started: int
    key: str
    nbytes: int
    written: bool = True


@dataclass
class StateDisk:
    """The states of all sessions of a server: one thread that writes them, one limit.

    folder      a folder for each session is made beneath
    limit       bytes of them all. To stay below, old states are thinned out
    """

    folder: Path
    limit: int
    metrics: Metrics
    every: int = EVERY
    rate: float = RATE

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.sessions: dict[str, SessionStates] = {}
        self.writer = ThreadPoolExecutor(1, "hiar-states")
        self.metrics.state_bytes.set_function(lambda: self.total)

    def of(self, name: str) -> SessionStates:
        """The states of a session, those among them that a server before this one wrote."""
        with self.lock:
            if name not in self.sessions:
                self.sessions[name] = SessionStates(self, self.folder / name)
            return self.sessions[name]

    @property
    def total(self) -> int:
        """Bytes of all states."""
        return sum(states.nbytes for states in list(self.sessions.values()))

    def remove(self, name: str) -> None:
        """Delete the states of a session."""
        with self.lock:
            states = self.sessions.pop(name, None)
            if states is not None:
                states.files.clear()
            with suppress(RuntimeError):  # closed: the next start deletes them
                self.writer.submit(shutil.rmtree, self.folder / name, True)

    def close(self) -> None:
        """Write what is to be written, and end the thread."""
        self.writer.shutdown(wait=True)

    def make_room(self, nbytes: int, own: SessionStates) -> bool:
        """Thin out states, of the session with the most bytes first; with the lock held. Returns whether it is enough:
        the last state of each session stays; that of ``own`` goes when the new one is written.
        """
        while self.total + nbytes > self.limit:
            several = [states for states in self.sessions.values() if len(states.files) > 1]
            if not several:
                return self.total - own.nbytes + nbytes <= self.limit
            max(several, key=lambda states: states.nbytes).thin()
        return True


class SessionStates:
    """The states of one session, in rising order of their blocks. All methods may be called from any thread."""

    def __init__(self, disk: StateDisk, folder: Path) -> None:
        self.disk, self.folder = disk, folder
        self.files: list[StateFile] = []
        self.next_at, self.warned = 0.0, False
        if folder.is_dir():
            for path in folder.iterdir():
                if match := NAME.fullmatch(path.name):
                    block, started, key = match.groups()
                    self.files.append(StateFile(path, int(block), int(started), key, path.stat().st_size))
                elif ".partial" in path.name:
                    discard(path)  # half of one
            self.files.sort(key=lambda file: file.block)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(file.nbytes for file in list(self.files))

    def due(self, block: int, nbytes: int) -> bool:
        """Whether a state of so many bytes before this block is to be saved now."""
        with self.disk.lock:
            before = max((file.block for file in self.files if file.block <= block), default=0)
            if block - before < self.disk.every or time.monotonic() < self.next_at:
                return False
            if nbytes > self.disk.limit:
                limit = f"--state-disk allows {self.disk.limit / 1e9:g}"
                self._warn(f"its states are not on the disk: one takes {nbytes / 1e9:.2g} GB, {limit}")
                return False
            return all(file.written for states in self.disk.sessions.values() for file in states.files)

    def save(self, block: int, started: int, key: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write what :func:`.session_tensors` made, in another thread. A full disk is logged once, and counted."""
        nbytes = sum(x.nbytes for x in tensors.values())
        file = StateFile(self.folder / f"{block:06}_{started}_{key}.safetensors", block, started, key, nbytes, False)
        with self.disk.lock:
            if self.disk.sessions.get(self.folder.name) is not self:
                return  # the session has gone
            if any(other.path == file.path for other in self.files):
                return
            if not self.disk.make_room(nbytes, self):
                self._warn(f"its states are not on the disk: the sessions fill --state-disk {self.disk.limit / 1e9:g}")
                return
            self.next_at = time.monotonic() + nbytes * len(self.disk.sessions) / self.disk.rate
            self.files.append(file)
            self.files.sort(key=lambda file: file.block)
            with suppress(RuntimeError):  # closed
                self.disk.writer.submit(self._write, file, tensors, metadata)

    def _write(self, file: StateFile, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            state_io.write(file.path, tensors, metadata)
        except OSError as error:
            self.disk.metrics.state_errors.inc()
            with self.disk.lock:
                self._forget([file])
                reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
                self._warn(f"a state is not on the disk, the video goes on: {reason}")
            return
        with self.disk.lock:
            file.written = True
            while self.disk.total > self.disk.limit and len(self.files) > 1:
                self.thin()
            if file not in self.files:  # it was dropped meanwhile
                discard(file.path)

    def before(self, block: int, below: int | None = None) -> list[StateFile]:
        """States at or before a block, in which no block from ``below`` on has begun, the newest first."""
        with self.disk.lock:
            files = [f for f in self.files if f.written and f.block <= block and (below is None or f.started < below)]
        return files[::-1]

    def drop(self, files: Iterable[StateFile]) -> None:
        """Delete states."""
        with self.disk.lock:
            self._forget(files)

    def drop_from(self, block: int) -> None:
        """Delete the states in which a block has begun whose prompt has changed."""
        with self.disk.lock:
            self._forget([file for file in self.files if file.started >= block])

    def thin(self) -> None:
        """Delete the one that is missed the least; with the lock held."""
        self._forget([self.files[least_useful([file.block for file in self.files])]])

    def _forget(self, files: Iterable[StateFile]) -> None:
        for file in files:
            if file in self.files:
                self.files.remove(file)
            discard(file.path)

    def _warn(self, text: str) -> None:
        if not self.warned:
            log.warning("session %s: %s", self.folder.name, text)
        self.warned = True
