"""A rollout on disk, as far as it has come: finished blocks one by one, and states of all ranks to go on from.

    run.json                         what is being made; another request is refused
    block_000012.safetensors         latents of a finished block
    state_000020_rank_1.safetensors  what rank 1 needs to go on with block 20

Every file has a temporary name until it is whole. States of one block are taken when each rank has done all before that
block (`Rollout(on_boundary=...)`), so that nothing is on its way between ranks and they fit together.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.checks import whole
from ..io.atomic import atomic_write
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
        folder: made if it is not there. about: what is being made, as JSON takes it. resume: go on with what is there.
        every: blocks between two states; 0: none. group: of the pipeline; None: one process.

    Raises:
        ValueError: there is a run already and ``resume`` is False, or it was of another request.
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
        self.rank, self.ranks = _place(group)
        self.begun = 0  # the block that states of this run were taken at last
        self._check(json.loads(json.dumps(about)), resume)
        if self.group is not None:
            self._gather(None)  # all have looked before one writes
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
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is corrupt: {error}") from error
        if "noise" in about:
            require_noise(str(self.folder), found.get("noise"))
        for key in {**found, **about}:
            was, now = found.get(key), about.get(key)
            if was != now:
                raise ValueError(f"{self.folder} is of another run: {key} was {was!r}, now it is {now!r}")

    # Finished blocks.

    def blocks(self) -> list[int]:
        """Numbers of the blocks that are there, rising."""
        return sorted(int(match[1]) for match in map(_BLOCK.fullmatch, self._names()) if match)

    def save_block(self, finished: FinishedBlock) -> None:
        """Keep the latents of a finished block."""
        name = f"block_{finished.block:06d}.safetensors"
        state_io.write(self.folder / name, {"latents": finished.latents}, {"first_frame": str(finished.first_frame)})

    def load_block(self, block: int) -> FinishedBlock:
        """A block that is there."""
        from .engine import FinishedBlock

        path = self.folder / f"block_{block:06d}.safetensors"
        tensors, told = state_io.read(path)
        return FinishedBlock(block, int(told["first_frame"]), tensors["latents"])

    # States.

    def states(self) -> list[int]:
        """Blocks that this rank can go on with, rising."""
        found = (match for match in map(_STATE.fullmatch, self._names()) if match)
        return sorted(int(match[1]) for match in found if int(match[2]) == self.rank)

    def boundary(self, rollout: Rollout, block: int) -> None:
        """For ``on_boundary``: save this rank's state if one is due."""
        if not self.every or block % self.every:
            return
        state_io.write(self.folder / self._state(block), *state_io.pack(rollout.state_dict()))
        self.begun = block
        self._forget()

    def resume(self, rollout: Rollout) -> int:
        """Bring a fresh rollout to the newest block that every rank can go on with; returns it (0: from the start)."""
        mine = [n for n in self.states() if self.rank < self.ranks - 1 or set(self.blocks()) >= self._made(rollout, n)]
        common = set.intersection(*map(set, self._gather(mine)))
        self.begun = max(common, default=0)
        if self.begun:
            rollout.load_state_dict(state_io.unpack(*state_io.read(self.folder / self._state(self.begun))))
        return self.begun

    def _made(self, rollout: Rollout, block: int) -> set[int]:
        return set(range(rollout.plan.prefix_blocks, block))

    def _forget(self) -> None:
        """Remove states that no rank will go back to: keep from the newest that every rank has, and one before it."""
        newest: dict[int, int] = {}
        for match in filter(None, map(_STATE.fullmatch, self._names())):
            newest[int(match[2])] = max(newest.get(int(match[2]), 0), int(match[1]))
        if len(newest) < self.ranks:
            return
        older = [n for n in self.states() if n <= min(newest.values())]
        for block in older[:-2]:
            (self.folder / self._state(block)).unlink(missing_ok=True)

    def remove(self) -> None:
        """The video is made: nothing of this is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # Files.

    def _state(self, block: int) -> str:
        return f"state_{block:06d}_rank_{self.rank}.safetensors"

    def _names(self) -> list[str]:
        return os.listdir(self.folder) if self.folder.is_dir() else []

    def _gather(self, what: Any) -> list[Any]:
        """What every rank says."""
        if self.group is None:
            return [what]
        import torch.distributed as dist

        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, what, group=self.group)
        return found


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if group is None:
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(group), dist.get_world_size(group)
