"""The steps of each rank of a pipeline, and the tasks that a rank runs. Plain data, no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .costs import Costs, unit_costs
from .plan import Group, Plan, rank_order
from .simulator import Simulation


def split_steps(plan: Plan, num_blocks: int | None, ranks: int, costs: Costs | None = None) -> tuple[int, ...]:
    """Steps per rank: the split of the steps over `ranks` ranks that is fastest in the simulator.

    Args:
        num_blocks: blocks of the video; None: endless, judged by its steady state.
        costs: of the tasks, such as :func:`hiar_model.planning.measure_costs` returns; None: all tasks take the same.

    Raises:
        ValueError: more ranks than steps, or an order that cannot run on several ranks.

    Example:
        >>> split_steps(Plan(4, "stream", 3), None, ranks=2)
        (2, 2)
    """
    return Simulation(plan, _enough(plan, num_blocks), unit_costs() if costs is None else costs).timeline(ranks).split


def faster_fusion(plan: Plan, num_blocks: int | None, ranks: int | Sequence[int], costs: Costs) -> Plan:
    """The plan with or without fused tasks, whichever is faster in the simulator on these ranks, or with this split."""
    plans = [replace(plan, fuse_cache_denoise=fused) for fused in (False, True)]
    return min(plans, key=lambda one: Simulation(one, _enough(one, num_blocks), costs).timeline(ranks).time)


def _enough(plan: Plan, num_blocks: int | None) -> int:
    """A number of blocks beyond which the best choice no longer changes."""
    enough = plan.prefix_blocks + 3 * plan.steps + 20
    return enough if num_blocks is None else min(num_blocks, enough)


@dataclass(frozen=True)
class RankSteps:
    """The steps of a plan that one rank of a pipeline runs.

    Args:
        plan: of the whole video.
        split: number of steps of each rank, in order. The last may be 0: that rank runs no task and receives the
            finished blocks.
        rank: index into `split`.

    Raises:
        ValueError: a split that does not fit the plan.
    """

    plan: Plan
    split: tuple[int, ...]
    rank: int

    def __post_init__(self) -> None:
        steps, split = self.plan.steps, self.split
        if sum(split) != steps or not split or min(split[:-1], default=1) < 1 or split[-1] < 0:
            raise ValueError(
                f"steps_per_rank must be numbers >= 1 that sum to {steps}, with a 0 after them for a rank that only "
                f"receives finished blocks, got {list(split)}"
            )
        if len([n for n in split if n]) > 1 and self.plan.graph == "clean":
            raise ValueError(f"order='block_first' runs on 1 rank (its steps share one cache), got {len(split)}")
        if len([n for n in split if n]) > 1 and self.plan.kv_source != "own":
            raise ValueError(
                f"kv_source={self.plan.kv_source!r} runs on 1 rank (keys are not sent), got {len(split)}: "
                "give kv_source='own', or 1 rank"
            )

    @property
    def steps(self) -> range:
        """The steps of this rank."""
        first = sum(self.split[: self.rank])
        return range(first, first + self.split[self.rank])

    @property
    def sends(self) -> bool:
        """Whether latents go to the next rank; the one rank that does not send has the finished blocks."""
        return self.rank < len(self.split) - 1

    @property
    def name(self) -> str:
        """Rank and steps, for messages."""
        return f"rank {self.rank} ({steps_label(self.steps)})"

    def groups(self, num_blocks: int | None) -> Iterator[Group]:
        """The batch items of this rank, one by one; for a rank without steps, those whose results it receives."""
        last = self.plan.steps - 1
        for group in self.plan.groups(num_blocks):
            for item in rank_order(group):
                task = item[-1]
                if task.step in self.steps or (not self.steps and task[:2] == ("denoise", last)):
                    yield (item,)


def steps_label(steps: Sequence[int]) -> str:
    """For example "step 2" or "steps 0-1"."""
    if not steps:
        return "takes finished blocks"
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}-{steps[-1]}"
