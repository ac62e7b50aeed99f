"""Steps on ranks: what one process of a pipeline has, does, and tells.

A rank walks the plan's tasks at its own steps, block by block, and holds only their caches. Latents x[s + 1][n] go to
the next rank the moment denoise(s, n) ends, before cache(s, n): see :class:`Neighbours`. The last rank has the finished
blocks. Whatever the number of ranks, the rows are the same, and so are the results, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common import environment
from ..config import ExecutionConfig
from ..schedule.plan import Group, Plan
from ..schedule.stages import Stage, split_steps
from .mesh import axis, axis_size

if TYPE_CHECKING:
    import torch.distributed as dist

    from .p2p import Neighbours
    from .watchdog import Watch

PREFIX = "pipeline"
_FOR_EVER = timedelta(days=30)  # how long is too long is told by Watch


def init_distributed(device_type: str = "cpu") -> int:
    """Meet the other processes that torchrun started, unless that was done; returns how many there are."""
    import torch.distributed as dist

    if not dist.is_available():
        return 1
    if not dist.is_initialized() and environment.world_size() > 1:
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_FOR_EVER)
    return dist.get_world_size() if dist.is_initialized() else 1


class Pipeline:
    """This process's place in a pipeline, and its links, which are made when it begins to run.

    Args:
        execution: its mesh has the ranks along "step"; without one this process walks all steps by itself.
        plan, num_blocks: of the whole video. device: of the model. block, dtype: shape and dtype of a block of latents.

    Raises:
        ValueError: the ranks cannot share the steps so.
    """

    def __init__(
        self,
        execution: ExecutionConfig,
        plan: Plan,
        num_blocks: int | None,
        device: torch.device,
        block: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.execution, self.plan, self.num_blocks, self.device = execution, plan, num_blocks, device
        self.block, self.dtype = block, dtype
        self.group: dist.ProcessGroup | None = None
        rank, ranks = 0, axis_size(execution.mesh, "step")
        if ranks > 1:
            self.group = axis(execution.mesh, "step")
            rank = execution.mesh.get_local_rank("step")
        self.stage = Stage(plan, self._split(ranks), rank)
        self.links: Neighbours | None = None
        self.watch: Watch | None = execution.watchdog

    def _split(self, ranks: int) -> tuple[int, ...]:
        """Steps of each rank; every rank comes to the same."""
        given, apart = self.execution.steps_per_rank, self.execution.dedicated_decoder_rank
        if given is not None and len(given) != ranks:
            raise ValueError(f"steps_per_rank={list(given)} is not legal: give a number for each of {ranks} ranks")
        if given is not None:
            return tuple(given)
        working = ranks - apart
        if not 1 <= working <= self.plan.steps:
            steps, decoder = self.plan.steps, ", and one more that decodes" if apart else ""
            raise ValueError(f"{ranks} ranks cannot share {steps} steps: give 1 to {steps}{decoder}")
        split = split_steps(self.plan, self.num_blocks, working, self.execution.costs)
        return (*split, 0) if apart else split

    def receive(self, block: int) -> Tensor:
        """Latents of a block at the first own step's level; valid until the next call."""
        assert self.links is not None
        step = self.stage.steps.start
        self._at(f"step {step} of block {block} (waiting for its latents)", "wait")
        found = self._linked(lambda links: links.receive(block))
        self._at(f"step {step} of block {block}")
        return found

    def send(self, block: int, latents: Tensor) -> None:
        """Send latents behind the last own step."""
        place = f"step {self.stage.steps.stop - 1} of block {block}"
        self._at(f"{place} (sending its latents)", "wait")
        self._linked(lambda links: links.send(block, latents))
        self._at(place)

    def enter(self, group: Group) -> None:
        """These tasks come next."""
        task = group[0][-1]
        self._at(f"step {task.step} of block {task.block} ({task.kind})")

    def hand_over(self, block: int) -> None:
        """A finished block goes to whoever iterates; how long that takes is none of ours."""
        self._at(f"step {self.plan.steps - 1} of block {block} (finished)", "wait")

    def done(self, block: int) -> None:
        """This rank has done all of a block."""
        if self.watch is not None:
            self.watch.begun = True
            if not self.stage.sends:
                self.watch.finished = block + 1 - self.plan.prefix_blocks

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the rank walks: faults are watched for; it ends when all ranks have come to their ends."""
        if self.group is None:
            yield
            return

        from .p2p import Neighbours
        from .watchdog import PipelineFault, Stopped, Watch

        if self.links is None:
            self.links = Neighbours(self.group, self.block, self.dtype, self.device, self.num_blocks, self._check)
        with ExitStack() as stack:
            if self.execution.watchdog is None:
                self.watch = stack.enter_context(Watch(self.group, self.execution.timeout))
            watch = self.watch
            assert watch is not None
            watch.name = self.stage.name
            try:
                yield
                self._at("its end (waiting for the others)", "wait")
                self._linked(lambda links: links.flush())
                watch.meet()
            except Stopped:
                pass
            except GeneratorExit:
                watch.stop()
                raise
            except PipelineFault:
                raise
            except Exception as error:
                watch.failed(error)
                raise

    def _linked(self, use: Callable[[Neighbours], Any]) -> Any:
        from .p2p import LinkBroken

        assert self.links is not None
        try:
            return use(self.links)
        except LinkBroken as error:
            if self.watch is not None:
                self.watch.lost(error.peer)
            raise

    def _at(self, place: str, state: str = "run") -> None:
        if self.watch is not None:
            self.watch.at(place, state)

    def _check(self) -> None:
        if self.watch is not None:
            self.watch.check()
