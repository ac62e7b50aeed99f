"""Steps on ranks: what one process of a pipeline has, does, and tells.

A rank walks the plan's visits at its own steps, block by block, and holds only their caches. Latents x[s + 1][n] go to
the next rank the moment denoise(s, n) ends, before cache(s, n): see :class:`Neighbours`. The last rank has the finished
blocks. Whatever the number of ranks, the rows are the same, and so are the results, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..schedule.costs import Costs
from ..schedule.plan import Group, Plan
from ..schedule.stages import Stage, split_steps, with_faster_pairs

if TYPE_CHECKING:
    import torch.distributed as dist

    from .p2p import Neighbours
    from .watchdog import Watch

PREFIX = "pipeline"
_FOR_EVER = timedelta(days=30)  # how long is too long is told by Watch


@dataclass(frozen=True)
class PipelineOptions:
    """How a rollout with executor="pipeline" uses the processes of a job.

    steps_per_rank   None: the fastest split found for `costs`; or a number for each rank, in order
    costs            of visits; or what measures them, on the first rank: `planning.measure_costs`; None: all the same
    decode_apart     the last rank has no steps: it takes finished blocks, to decode them beside the others' work
    group            the processes, in order of their steps; None: all of the job
    timeout          seconds within which a fault ends the job; a first block may take ten times that
    alone            this process walks all steps by itself, whatever the job has
    watch            one that runs already; None: one is started for every iteration
    """

    steps_per_rank: Sequence[int] | None = None
    costs: Costs | Callable[..., Costs] | None = None
    decode_apart: bool = False
    group: dist.ProcessGroup | None = None
    timeout: float = 60.0
    alone: bool = False
    watch: Watch | None = None


def join(device_type: str = "cpu") -> int:
    """Meet the other processes that torchrun started, unless that was done; returns how many there are."""
    import torch.distributed as dist

    if not dist.is_available():
        return 1
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_FOR_EVER)
    return dist.get_world_size() if dist.is_initialized() else 1


class Pipeline:
    """This process's place in a pipeline, and its links.

    Args:
        options: see there. plan, num_blocks: of the whole video. device: of the model. measure: returns measured costs.
        choose_pairs: whether ``self.plan`` fuses visits in pairs is what is faster by measured costs.

    Raises:
        ValueError: the ranks cannot share the steps so.
    """

    def __init__(
        self,
        options: PipelineOptions,
        plan: Plan,
        num_blocks: int | None,
        device: torch.device,
        measure: Callable[[], Costs],
        choose_pairs: bool = False,
    ) -> None:
        self.options, self.plan, self.num_blocks, self.device = options, plan, num_blocks, device
        self.group: dist.ProcessGroup | None = None
        rank, ranks = 0, 1
        if not options.alone and join(device.type) > 1:
            import torch.distributed as dist

            self.group = options.group or dist.group.WORLD
            rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
            if ranks == 1:
                self.group = None
        self.plan, split = self._shared_out(rank, ranks, measure, choose_pairs)
        self.stage = Stage(self.plan, split, rank)
        self.links: Neighbours | None = None
        self.watch: Watch | None = options.watch

    def _shared_out(
        self, rank: int, ranks: int, measure: Callable[[], Costs], choose_pairs: bool
    ) -> tuple[Plan, tuple[int, ...]]:
        """The plan, with pairs or without, and the steps of each rank."""
        options, plan, given = self.options, self.plan, self.options.steps_per_rank
        if given is not None and len(given) != ranks:
            raise ValueError(f"steps_per_rank={list(given)} is not legal: give a number for each of {ranks} ranks")
        working = ranks - options.decode_apart
        if given is None and not 1 <= working <= plan.steps:
            apart = ", and one more that decodes" if options.decode_apart else ""
            raise ValueError(f"{ranks} ranks cannot share {plan.steps} steps: give 1 to {plan.steps}{apart}")
        found: list[tuple[Plan, tuple[int, ...]]] = [(plan, ())]
        if rank == 0:
            asked = options.costs
            costs = measure() if callable(asked) else asked
            if choose_pairs and costs is not None:
                at_work = working if given is None else [n for n in given if n]
                plan = with_faster_pairs(plan, self.num_blocks, at_work, costs)
            split = tuple(given) if given is not None else split_steps(plan, self.num_blocks, working, costs)
            found = [(plan, split)]
        if self.group is not None:
            import torch.distributed as dist

            dist.broadcast_object_list(found, group=self.group, group_src=0)  # measured times are not the same twice
        plan, split = found[0]
        return plan, (*split, 0) if options.decode_apart and given is None else split

    def connect(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Make the links for blocks of latents of this shape."""
        if self.group is not None:
            from .p2p import Neighbours

            self.links = Neighbours(self.group, shape, dtype, self.device, self.num_blocks, self._check)

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
        """These visits come next."""
        visit = group[0][-1]
        self._at(f"step {visit.step} of block {visit.block} ({visit.kind})")

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

        from .watchdog import PipelineFault, Stopped, Watch

        with ExitStack() as stack:
            if self.options.watch is None:
                self.watch = stack.enter_context(Watch(self.group, self.options.timeout))
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
