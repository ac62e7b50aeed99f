"""A pipeline over denoising steps: the part of one process.

A rank runs the tasks of its own steps, block by block, and has only their caches. Latents x[s + 1][n] are sent to the
next rank when denoise(s, n) ends, before cache(s, n): see :class:`Neighbours`. The last rank has the finished blocks.
Batches do not depend on the number of ranks, so results are equal bit for bit.
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
from ..schedule.stages import RankSteps, split_steps
from .mesh import axis, axis_size

if TYPE_CHECKING:
    import torch.distributed as dist

    from .p2p import Neighbours
    from .watchdog import Watchdog

_NO_LIMIT = timedelta(days=30)  # the watchdog decides when a wait has been too long


def init_distributed(device_type: str = "cpu") -> int:
    """Initialize torch.distributed if torchrun started this process; returns the number of processes."""
    import torch.distributed as dist

    if not dist.is_available():
        return 1
    if not dist.is_initialized() and environment.world_size() > 1:
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_NO_LIMIT)
    return dist.get_world_size() if dist.is_initialized() else 1


class Pipeline:
    """One process of a pipeline: its stage, and links to its neighbours, which :meth:`running` opens.

    Args:
        execution: the axis "step" of its mesh has the ranks; without a mesh this process runs all steps.
        plan, num_blocks: of the whole video. device: of the model. block, dtype: shape and dtype of a block of latents.

    Raises:
        ValueError: the steps cannot be split over the ranks as requested.
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
        self.stage = RankSteps(plan, self._split(ranks), rank)
        self.links: Neighbours | None = None
        self.watchdog: Watchdog | None = execution.watchdog

    def _split(self, ranks: int) -> tuple[int, ...]:
        """Steps of each rank, the same result on every rank."""
        split, decoder = self.execution.steps_per_rank, self.execution.dedicated_decoder_rank
        if split is not None:
            if len(split) != ranks:
                raise ValueError(f"steps_per_rank must have a number for each of {ranks} ranks, got {list(split)}")
            return tuple(split)
        computing, steps = ranks - decoder, self.plan.steps
        if not 1 <= computing <= steps:
            more = ", and one more that decodes" if decoder else ""
            raise ValueError(f"a pipeline of {steps} steps must have 1 to {steps} ranks{more}, got {ranks}")
        split = split_steps(self.plan, self.num_blocks, computing, self.execution.costs)
        return (*split, 0) if decoder else split

    def receive(self, block: int) -> Tensor:
        """Latents of a block at the noise level of this rank's first step; valid until the next call."""
        assert self.links is not None
        step = self.stage.steps.start
        self._at(f"step {step} of block {block} (waiting for its latents)", "wait")
        latents = self._use_links(lambda links: links.receive(block))
        self._at(f"step {step} of block {block}")
        return latents

    def send(self, block: int, latents: Tensor) -> None:
        """Send the latents of a block after this rank's last step."""
        position = f"step {self.stage.steps.stop - 1} of block {block}"
        self._at(f"{position} (sending its latents)", "wait")
        self._use_links(lambda links: links.send(block, latents))
        self._at(position)

    def start(self, group: Group) -> None:
        """Tell the watchdog which tasks run next."""
        task = group[0][-1]
        self._at(f"step {task.step} of block {task.block} ({task.kind})")

    def hand_over(self, block: int) -> None:
        """Tell the watchdog that the caller has a finished block; its time does not count as a hang."""
        self._at(f"step {self.plan.steps - 1} of block {block} (finished)", "wait")

    def done(self, block: int) -> None:
        """Tell the watchdog that this rank has run all its tasks of a block."""
        if self.watchdog is not None:
            self.watchdog.warmed_up = True
            if not self.stage.sends:
                self.watchdog.finished = block + 1 - self.plan.prefix_blocks

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context in which the rank runs its tasks under the watchdog; it exits when all ranks are done."""
        if self.group is None:
            yield
            return

        from .p2p import Neighbours
        from .watchdog import PipelineFault, Stopped, Watchdog

        if self.links is None:
            self.links = Neighbours(self.group, self.block, self.dtype, self.device, self.num_blocks, self._check)
        with ExitStack() as stack:
            if self.execution.watchdog is None:
                self.watchdog = stack.enter_context(Watchdog(self.group, self.execution.timeout))
            watchdog = self.watchdog
            assert watchdog is not None
            watchdog.name = self.stage.name
            try:
                yield
                self._at("its end (waiting for the others)", "wait")
                self._use_links(lambda links: links.flush())
                watchdog.barrier()
            except Stopped:
                pass
            except GeneratorExit:
                watchdog.stop()
                raise
            except PipelineFault:
                raise
            except Exception as error:
                watchdog.report_error(error)
                raise

    def _use_links(self, use: Callable[[Neighbours], Any]) -> Any:
        from .p2p import LinkBroken

        assert self.links is not None
        try:
            return use(self.links)
        except LinkBroken as error:
            if self.watchdog is not None:
                self.watchdog.report_broken_link(error.peer)
            raise

    def _at(self, position: str, state: str = "run") -> None:
        if self.watchdog is not None:
            self.watchdog.at(position, state)

    def _check(self) -> None:
        if self.watchdog is not None:
            self.watchdog.check()
