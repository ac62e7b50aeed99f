"""Which steps live on which rank of a pipeline, and what a rank tasks. Plain data, no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .costs import Costs, unit_costs
from .plan import Group, Plan, rank_order
from .simulator import TaskOrder


def split_steps(plan: Plan, num_blocks: int | None, ranks: int, costs: Costs | None = None) -> tuple[int, ...]:
    """Steps per rank, by the simulator: the fastest split of the steps over so many ranks.

    Args:
        num_blocks: of the video; None: endless, judged by its steady state.
        costs: of the tasks, such as :func:`.measure_costs` returns; None: all cost the same.

    Raises:
        ValueError: more ranks than steps, or an order that ranks cannot share.
    """
    return TaskOrder(plan, _enough(plan, num_blocks), unit_costs() if costs is None else costs).timeline(ranks).split


def faster_fusion(plan: Plan, num_blocks: int | None, ranks: int | Sequence[int], costs: Costs) -> Plan:
    """The plan with fused tasks or without, whichever the simulator finds faster on so many ranks, or such a split."""
    plans = [replace(plan, fuse_cache_denoise=fused) for fused in (False, True)]
    return min(plans, key=lambda one: TaskOrder(one, _enough(one, num_blocks), costs).timeline(ranks).time)


def _enough(plan: Plan, num_blocks: int | None) -> int:
    """Blocks after which more of them change no choice."""
    enough = plan.prefix_blocks + 3 * plan.steps + 20
    return enough if num_blocks is None else min(num_blocks, enough)


@dataclass(frozen=True)
class Stage:
    """The part of a plan that one rank of a pipeline has.

    split   steps of each rank, in order; the last may have 0: it tasks nothing and takes the finished blocks
    rank    which of them this is
    """

    plan: Plan
    split: tuple[int, ...]
    rank: int

    def __post_init__(self) -> None:
        steps, split = self.plan.steps, self.split
        if sum(split) != steps or not split or min(split[:-1], default=1) < 1 or split[-1] < 0:
            raise ValueError(
                f"steps per rank {list(split)} is not legal: give numbers >= 1 that sum to {steps}, and perhaps a 0 "
                "behind them for a rank that takes the finished blocks"
            )
        if len([n for n in split if n]) > 1 and self.plan.graph == "clean":
            raise ValueError(f"order='block_first' cannot run on {len(split)} ranks (steps share one cache): give 1")
        if len([n for n in split if n]) > 1 and self.plan.kv_source != "own":
            raise ValueError(
                f"kv_source={self.plan.kv_source!r} cannot run on {len(split)} ranks (keys are not sent): "
                "give kv_source='own', or 1 rank"
            )

    @property
    def steps(self) -> range:
        """The steps of this rank."""
        first = sum(self.split[: self.rank])
        return range(first, first + self.split[self.rank])

    @property
    def receives(self) -> bool:
        """Whether latents come from the rank before."""
        return self.rank > 0

    @property
    def sends(self) -> bool:
        """Whether latents go to the rank behind; finished blocks come out of the one rank that sends none."""
        return self.rank < len(self.split) - 1

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.rank} ({steps_text(self.steps)})"

    def groups(self, num_blocks: int | None) -> Iterator[Group]:
        """What this rank tasks, row by row; without steps, the tasks whose results it takes."""
        last = self.plan.steps - 1
        for group in self.plan.groups(num_blocks):
            for row in rank_order(group):
                task = row[-1]
                if task.step in self.steps or (not self.steps and task[:2] == ("denoise", last)):
                    yield (row,)


def steps_text(steps: Sequence[int]) -> str:
    """Such as "step 2", "steps 0-1"."""
    if not steps:
        return "takes finished blocks"
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}-{steps[-1]}"
