"""The folder of an unfinished pipeline run: its finished blocks, and states of all ranks to resume from.

    run.json                         the request; a different one is refused
    block_000012.safetensors         latents of a finished block
    state_000020_rank_1.safetensors  state of rank 1 before block 20

Every file is written atomically. The states of one block are taken when each rank has done all tasks before that block
(`Rollout.on_boundary`), when nothing is in transit between ranks, so they are consistent.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.checks import whole
from ..io.atomic import atomic_write, discard
from ..version import require_noise
from . import state_io

if TYPE_CHECKING:
    import torch.distributed as dist

    from .engine import FinishedBlock, Rollout

ABOUT = "run.json"
_STATE = re.compile(r"state_(\d+)_rank_(\d+)\.safetensors")
_BLOCK = re.compile(r"block_(\d+)\.safetensors")


class RunFolder:
    """One rank's view of the folder of a run.

    Args:
        folder: created if missing. about: the request, as JSON. resume: continue an unfinished run.
        every: blocks between two states; 0: no states. group: of the pipeline; None: one process.

    Raises:
        ValueError: the folder holds a run and ``resume`` is False, or a run of a different request.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        about: Mapping[str, Any],
        *,
        resume: bool = False,
        every: int = 10,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        every = whole("checkpoint_every", every, 0, " (blocks; 0: none)")
        self.folder, self.every, self.group = Path(folder), every, group
        self.rank, self.ranks = _rank_and_size(group)
        self._check(json.loads(json.dumps(about)), resume)
        if self.group is not None:
            self._gather(None)  # every rank has checked before one writes
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            atomic_write(self.folder / ABOUT, json.dumps(about, indent=2) + "\n")

    def _check(self, about: dict[str, Any], resume: bool) -> None:
        path = self.folder / ABOUT
        if not path.exists() or not any(map(_BLOCK.fullmatch, self._names())):
            return
        if not resume:
            raise ValueError(f"{self.folder} holds an unfinished run: go on with it (--resume), or remove it")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is corrupt: {error}") from error
        if not isinstance(stored, dict):
            raise ValueError(f"{path} is corrupt: expected an object, got a {type(stored).__name__}")
        if "noise" in about:
            require_noise(str(self.folder), stored.get("noise"))
        for key in {**stored, **about}:
            was, now = stored.get(key), about.get(key)
            if was != now:
                raise ValueError(f"{self.folder} is of another run: {key} was {was!r}, now it is {now!r}")

    # Finished blocks.

    def blocks(self) -> list[int]:
        """Numbers of the stored blocks, ascending."""
        return sorted(int(match[1]) for match in map(_BLOCK.fullmatch, self._names()) if match)

    def save_block(self, finished: FinishedBlock) -> None:
        """Store the latents of a finished block."""
        name = f"block_{finished.block:06d}.safetensors"
        state_io.write(self.folder / name, {"latents": finished.latents}, {"first_frame": str(finished.first_frame)})

    def load_block(self, block: int) -> FinishedBlock:
        """Load a stored block."""
        from .engine import FinishedBlock

        path = self.folder / f"block_{block:06d}.safetensors"
        tensors, metadata = state_io.read(path)
        try:
            return FinishedBlock(block, state_io.field(metadata, "first_frame", int), tensors["latents"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is no block of a run: {error}; delete {self.folder} to start anew") from error

    # States.

    def states(self) -> list[int]:
        """Blocks before which this rank has a state, ascending."""
        matches = filter(None, map(_STATE.fullmatch, self._names()))
        return sorted(int(match[1]) for match in matches if int(match[2]) == self.rank)

    def boundary(self, rollout: Rollout, block: int) -> None:
        """The callback for ``Rollout.on_boundary``: save this rank's state if one is due."""
        if not self.every or block % self.every:
            return
        state_io.write(self.folder / self._state(block), *state_io.pack(rollout.state_dict()))
        self._prune()

    def resume(self, rollout: Rollout) -> int:
        """Restore a fresh rollout to the newest block that every rank has a state for; returns it (0: the start)."""
        first, stored = rollout.plan.prefix_blocks, set(self.blocks())
        mine = [n for n in self.states() if self.rank < self.ranks - 1 or stored.issuperset(range(first, n))]
        common = set.intersection(*map(set, self._gather(mine)))
        if newest := max(common, default=0):
            path = self.folder / self._state(newest)
            tensors, metadata = state_io.read(path)
            try:
                rollout.load_state_dict(state_io.unpack(tensors, metadata))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        return newest

    def _prune(self) -> None:
        """Remove old states: keep the newest that every rank has, the one before it, and later ones."""
        newest: dict[int, int] = {}
        for match in filter(None, map(_STATE.fullmatch, self._names())):
            newest[int(match[2])] = max(newest.get(int(match[2]), 0), int(match[1]))
        if len(newest) < self.ranks:
            return
        older = [n for n in self.states() if n <= min(newest.values())]
        for block in older[:-2]:
            (self.folder / self._state(block)).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the files of the run once the video is written, and the folder if nothing else is in it."""
        for name in self._names():
            if name == ABOUT or _STATE.fullmatch(name) or _BLOCK.fullmatch(name) or ".partial" in name:
                discard(self.folder / name)
        with suppress(OSError):
            self.folder.rmdir()

    # Files.

    def _state(self, block: int) -> str:
        return f"state_{block:06d}_rank_{self.rank}.safetensors"

    def _names(self) -> list[str]:
        return os.listdir(self.folder) if self.folder.is_dir() else []

    def _gather(self, value: Any) -> list[Any]:
        """The value of every rank."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.group)
        return values


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if group is None:
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(group), dist.get_world_size(group)
