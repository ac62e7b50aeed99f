"""Simulate when each task would run on one rank or a pipeline of ranks. Plain data, no tensors.

A rank has consecutive steps and runs its batch items in task order, those of a group in `rank_order`. An item starts
when its rank is free and its dependencies have arrived. Transfers overlap with the work of the ranks; a link between
two ranks carries one message at a time in each direction. Nothing else is modelled.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb
from typing import NamedTuple

from ..common.checks import as_whole, one_of, whole
from .costs import Costs, unit_costs
from .plan import Group, Plan, Task, denoise, dependencies, rank_order

VAE = ("none", "last", "own")
MOST_SPLITS = 20_000  # more splits than this are not enumerated: local search from the split with the best bound
MOST_TRIALS = 40  # simulations in one search
ROUNDING = 1e-9


class Event(NamedTuple):
    """Batch items that one rank runs from start to end; without items: it decodes the pixels of block `decoded`."""

    rank: int
    items: Group
    start: float
    end: float
    decoded: int | None = None


@dataclass(frozen=True)
class Timeline:
    """The result of a simulation. Times are in the unit of the costs.

    Attributes:
        split: steps of each rank, without the rank that only decodes.
        ranks: number of ranks, decoder included.
        events: in the order in which they were simulated.
        bytes_sent: by all ranks.
        lower_bound: no split over these ranks takes less time; 0 where the split was an argument.
        level_from: first block with full windows: its tasks cost as much as the last block's.
    """

    plan: Plan
    num_blocks: int
    split: tuple[int, ...]
    ranks: int
    events: tuple[Event, ...]
    bytes_sent: float
    lower_bound: float
    level_from: int

    @cached_property
    def time(self) -> float:
        """From the first start to the last end."""
        return max((event.end for event in self.events), default=0.0)

    @cached_property
    def started(self) -> dict[int, float]:
        """Start of the first denoise task of each generated block."""
        return {task.block: e.start for e in self.events for task in _tasks(e.items) if task[:2] == ("denoise", 0)}

    @cached_property
    def finished(self) -> dict[int, float]:
        """When each generated block is ready: its pixels where the timeline decodes them, else its latents."""
        pixels = {e.decoded: e.end for e in self.events if e.decoded is not None}
        last = ("denoise", self.plan.steps - 1)
        latents = {task.block: e.end for e in self.events for task in _tasks(e.items) if task[:2] == last}
        return {block: pixels.get(block, end) for block, end in latents.items()}

    @property
    def first_block(self) -> float:
        """Time until the first block is ready."""
        return self.finished[self.plan.prefix_blocks]

    @property
    def _steady(self) -> range:
        """Blocks n where n and n + 1 have full windows and are away from both ends of the video."""
        if self.plan.order == "step_first":
            return range(0)  # all blocks finish in the last pass
        margin = 1 if len(self.split) == 1 and self.plan.order != "wavefront" else self.plan.steps
        return range(self.level_from + margin, self.num_blocks - 1 - margin)

    @property
    def steady_interval(self) -> float | None:
        """Mean time between finished blocks in the steady state; None where the video is too short for one."""
        steady = self._steady
        if not steady:
            return None
        return (self.finished[steady.stop] - self.finished[steady.start]) / len(steady)

    @property
    def prompt_delay(self) -> float | None:
        """Longest time from a change of the prompt to the end of the first block that shows it, in the steady state.

        A block keeps the prompt it started with, so in the worst case the prompt changes just after a block starts and
        the next block is the first to show it.
        """
        return max((self.finished[n + 1] - self.started[n] for n in self._steady), default=None)

    @cached_property
    def utilisation(self) -> tuple[float, ...]:
        """Share of the time that each rank is busy."""
        busy = [0.0] * self.ranks
        for event in self.events:
            busy[event.rank] += event.end - event.start
        return tuple(b / self.time if self.time else 0.0 for b in busy)


def simulate(
    plan: Plan,
    num_blocks: int,
    split: int | Sequence[int] = 1,
    costs: Costs | None = None,
    *,
    vae: str = "none",
    batch: bool = False,
    in_flight: int | None = None,
) -> Timeline:
    """The timeline of a video of num_blocks blocks, prefix included.

    Args:
        split: steps per rank; or a number of ranks, for the fastest split (see `Simulation.best_split`).
        costs: None: every task takes 1, transfers nothing.
        vae: "none": latents are the result. "last": the last rank decodes each block once it is denoised. "own": one
            more rank decodes.
        batch: one rank runs the items of a group as one batch (see `Costs.batch`).
        in_flight: most blocks between start and finish at once (None: no limit). Without a limit, ranks before the
            slowest one run further and further ahead of it.

    Raises:
        ValueError: names the illegal argument and the legal values.

    Example:
        >>> simulate(Plan(4, "stream", 3), num_blocks=7, split=4).time  # four ranks
        16.0
    """
    costs = unit_costs() if costs is None else costs
    return Simulation(plan, num_blocks, costs, vae=vae, batch=batch, in_flight=in_flight).timeline(split)


def _tasks(items: Group) -> Iterator[Task]:
    return (task for item in items for task in item)


class _Job(NamedTuple):
    """Batch items that run at once.

    `step` determines the rank; `sources` are the jobs of other steps that it depends on, `readers` the steps that
    depend on it; `after` is a job that must have ended first although it sends nothing.
    """

    step: int
    cost: float
    items: Group
    sources: tuple[int, ...]
    readers: tuple[int, ...]
    decoded: int | None
    after: int | None


class Simulation:
    """A task order with its costs, prepared once and simulated for several splits. Arguments as for `simulate`."""

    def __init__(
        self,
        plan: Plan,
        num_blocks: int,
        costs: Costs,
        *,
        vae: str = "none",
        batch: bool = False,
        in_flight: int | None = None,
    ) -> None:
        whole("num_blocks", num_blocks, plan.prefix_blocks, " (the prefix included)")
        one_of("vae", vae, VAE)
        if in_flight is not None:
            whole("in_flight", in_flight, 1)
        costs.check(plan)
        self.in_flight = in_flight
        self.plan, self.num_blocks, self.costs, self.vae, self.batch = plan, num_blocks, costs, vae, batch
        self.jobs = self._jobs()

    def timeline(self, split: int | Sequence[int]) -> Timeline:
        """Simulate one split, or the fastest split over a number of ranks."""
        plan, lower_bound = self.plan, 0.0
        ranks = as_whole(split)
        if ranks is not None:
            self._check_ranks(ranks)
            steps_per_rank, lower_bound = self.best_split(ranks)
        else:
            steps_per_rank = tuple(split)  # type: ignore[arg-type]
            self._check_ranks(len(steps_per_rank))
            if sum(steps_per_rank) != plan.steps or min(steps_per_rank) < 1:
                raise ValueError(f"split must be numbers >= 1 that sum to {plan.steps}, got {steps_per_rank}")
        owner = self._owners(steps_per_rank)
        starts, ends, sent = self._run(owner)
        events = [
            Event(owner[job.step], job.items, start, end, job.decoded)
            for job, start, end in zip(self.jobs, starts, ends, strict=True)
        ]
        ranks = len(steps_per_rank) + (self.vae == "own")
        return Timeline(
            plan, self.num_blocks, steps_per_rank, ranks, tuple(events), sent, lower_bound, self._level_from()
        )

    def best_split(self, ranks: int) -> tuple[tuple[int, ...], float]:
        """The fastest split found, and a lower bound of the time of any split; if the two are equal, it is optimal.

        A rank starts when the first latents have passed the steps before it, does its own work, and the last block then
        still has to pass the steps after it. The largest of these sums over the ranks is a lower bound for the split.
        Each sum depends on the steps of one rank only, so dynamic programming finds the split with the smallest bound.
        If its time is not equal to the bound, splits are simulated in order of their bounds until no other can be
        faster; where there are too many to list, single steps are moved between neighbours while that helps.
        """
        bound = _Bounds(self, ranks)
        best, lower_bound = bound.least_split()
        time = self._time(best)
        if time <= lower_bound * (1 + ROUNDING):
            return best, lower_bound
        if comb(self.plan.steps - 1, ranks - 1) <= MOST_SPLITS:
            ranked = sorted((bound.of(split), split) for split in _splits(self.plan.steps, ranks))
            for tried, (lower, split) in enumerate(ranked):
                if lower >= time * (1 - ROUNDING):
                    break
                if tried == MOST_TRIALS:
                    return best, lower
                candidate = self._time(split)
                if candidate < time * (1 - ROUNDING):
                    best, time = split, candidate
            return best, time
        trials = 0
        todo = sorted(_neighbours(best), key=bound.of)
        while todo and trials < MOST_TRIALS:
            split, trials = todo.pop(0), trials + 1
            candidate = self._time(split) if bound.of(split) < time * (1 - ROUNDING) else time
            if candidate < time * (1 - ROUNDING):
                best, time, todo = split, candidate, sorted(_neighbours(split), key=bound.of)
        return best, lower_bound

    def _check_ranks(self, ranks: int) -> None:
        whole("ranks", ranks, 1)
        if ranks > self.plan.steps:
            raise ValueError(f"ranks must be 1 to {self.plan.steps}, the number of steps, got {ranks}")
        if ranks > 1 and self.plan.graph == "clean":
            raise ValueError(f"ranks must be 1 with order='block_first' (its steps share one cache), got {ranks}")
        if ranks > 1 and self.batch:
            raise ValueError(f"ranks must be 1 with batch=True, got {ranks}")

    def _owners(self, split: tuple[int, ...]) -> list[int]:
        """The rank of each step, and the rank that decodes as last entry."""
        owner = [rank for rank, steps in enumerate(split) for _ in range(steps)]
        return [*owner, len(split) - (self.vae != "own")]

    def _jobs(self) -> list[_Job]:
        """All jobs in the order in which ranks run them."""
        plan, costs = self.plan, self.costs
        producer: dict[Task, int] = {}
        jobs: list[_Job] = []
        readers: list[set[int]] = []
        finishing: dict[int, int] = {}  # block -> the job that finishes it

        def add(step: int, cost: float, items: Group, needs: set[Task], decoded: int | None = None) -> None:
            # Tasks of the same step are on the same rank, in order anyway.
            sources = tuple({producer[need] for need in needs if need.step != step or decoded is not None})
            for source in sources:
                readers[source].add(step)
            producer.update((task, len(jobs)) for task in _tasks(items))
            jobs.append(_Job(step, cost, items, sources, (), decoded, None))
            readers.append(set())

        for group in plan.groups(self.num_blocks):
            ordered = rank_order(group)
            for items in [tuple(ordered)] if self.batch else [(item,) for item in ordered]:
                factor = costs.batch[min(len(items), len(costs.batch)) - 1] if self.batch else 1.0
                add(items[0][-1].step, factor * sum(costs.item(plan, i) for i in items), items, self._needs(items))
                for *_, task in items:
                    if task[:2] == ("denoise", plan.steps - 1):
                        if self.vae != "none":
                            add(plan.steps, costs.decode, (), {task}, task.block)
                        finishing[task.block] = len(jobs) - 1
        return [
            job._replace(readers=tuple(steps), after=self._after(index, job, finishing))
            for index, (job, steps) in enumerate(zip(jobs, readers, strict=True))
        ]

    def _after(self, index: int, job: _Job, finishing: dict[int, int]) -> int | None:
        """The job that must have ended before this one may start a new block, where blocks in flight are limited."""
        started = [task.block for task in _tasks(job.items) if task[:2] == ("denoise", 0)]
        if self.in_flight is None or not started or started[0] - self.in_flight < self.plan.prefix_blocks:
            return None
        after = finishing[started[0] - self.in_flight]
        if after > index:
            raise ValueError(
                f"in_flight={self.in_flight} is impossible with order={self.plan.order!r} of {self.plan.steps} steps: "
                "give more, or order='stream'"
            )
        return after

    def _needs(self, items: Group) -> set[Task]:
        """Dependencies on other steps (and perhaps own ones): with kv_source="own" these are latents only."""
        if self.plan.kv_source == "own":
            return {denoise(t.step - 1, t.block) for t in _tasks(items) if t.kind == "denoise" and t.step}
        return {need for task in _tasks(items) for need in dependencies(self.plan, task)}

    def _time(self, split: tuple[int, ...]) -> float:
        return max(self._run(self._owners(split))[1], default=0.0)

    def _run(self, owner: list[int]) -> tuple[list[float], list[float], float]:
        """Start and end of each job, and the bytes sent. One pass, since every job comes after its sources."""
        free = [0.0] * (max(owner) + 1)
        link_free: dict[tuple[int, int], float] = {}
        arrived: dict[tuple[int, int], float] = {}  # (job, rank)
        starts: list[float] = []
        ends: list[float] = []
        sent = 0.0
        for index, job in enumerate(self.jobs):
            rank = owner[job.step]
            start = free[rank] if job.after is None else max(free[rank], ends[job.after])
            for source in job.sources:
                if owner[self.jobs[source].step] != rank:
                    start = max(start, arrived[source, rank])
            free[rank] = end = start + job.cost
            starts.append(start)
            ends.append(end)
            for other in {owner[step] for step in job.readers} - {rank}:
                message = self.costs.latents if other > rank else self.costs.keys  # keys go to earlier steps
                leaves = max(end, link_free.get((rank, other), 0.0)) + message.busy
                link_free[rank, other], arrived[index, other] = leaves, leaves + message.delay
                sent += message.nbytes
        return starts, ends, sent

    def _level_from(self) -> int:
        """The first block that sees as many frames as the last one, at the steps whose costs depend on it."""
        plan, last = self.plan, self.num_blocks - 1
        curves = [(s, self.costs.curve(kind, s)) for s in range(plan.steps) for kind in ("denoise", "cache")]
        steps = sorted({s for s, curve in curves if len(curve.points) > 1})

        def settled(block: int) -> bool:
            return all(plan.visible_frames(s, block) == plan.visible_frames(s, last) for s in steps)

        return bisect_left(range(last), True, lo=min(plan.prefix_blocks, max(last, 0)), key=settled)


class _Bounds:
    """Lower bounds of the time of a split, rank by rank; see `Simulation.best_split`."""

    def __init__(self, simulation: Simulation, ranks: int) -> None:
        plan, steps = simulation.plan, simulation.plan.steps
        self.steps, self.ranks = steps, ranks
        self.work = [0.0] * (steps + 1)  # the last: decoding
        first, last = [0.0] * (steps + 1), [0.0] * (steps + 1)
        for job in simulation.jobs:
            self.work[job.step] += job.cost
            blocks: set[int | None] = {t.block for t in _tasks(job.items) if t.kind == "denoise"} or {job.decoded}
            if plan.prefix_blocks in blocks and not plan.prefix_blocks:  # every rank can start on a prefix at once
                first[job.step] = job.cost
            if simulation.num_blocks - 1 in blocks:
                last[job.step] = job.cost
        self.before = [sum(first[:s]) for s in range(steps + 1)]
        self.after = [sum(last[s:]) for s in range(steps + 1)]
        latents = simulation.costs.latents
        self.hop = latents.busy + latents.delay
        self.vae = simulation.vae

    def rank(self, rank: int, start: int, stop: int) -> float:
        """Lower bound of the total time if `rank` has steps [start, stop)."""
        work = sum(self.work[start:stop])
        hops, after = self.ranks - 1 - rank + (self.vae == "own"), self.after[stop]
        if rank == self.ranks - 1 and self.vae == "last":
            work, after = work + self.work[self.steps], 0.0
        return self.before[start] + work + after + self.hop * (hops + (rank if self.before[start] else 0))

    def of(self, split: tuple[int, ...]) -> float:
        """Lower bound of a split."""
        stops = [sum(split[: rank + 1]) for rank in range(len(split))]
        return max(self.rank(rank, stop - split[rank], stop) for rank, stop in enumerate(stops))

    def least_split(self) -> tuple[tuple[int, ...], float]:
        """The split with the smallest bound, and that bound.

        Of equal ones, that with most steps on the first ranks: work does not pile up after a slow first rank.
        """
        last = self.ranks - 1
        rest = {start: self.rank(last, start, self.steps) for start in range(last, self.steps)}
        least = {last: rest}  # least[rank][start]: bound if ranks from `rank` on have steps from `start` on
        for rank in reversed(range(last)):
            stops = range(rank + 1, self.steps - last + rank + 1)
            least[rank] = {
                start: min(max(self.rank(rank, start, stop), least[rank + 1][stop]) for stop in stops if stop > start)
                for start in range(rank, self.steps - last + rank)
            }
        bound, split, start = least[0][0], [], 0
        for rank in range(last):
            enough = bound * (1 + ROUNDING)
            stops = range(start + 1, self.steps - last + rank + 1)
            stop = max(s for s in stops if max(self.rank(rank, start, s), least[rank + 1][s]) <= enough)
            split.append(stop - start)
            start = stop
        return (*split, self.steps - start), bound


def _splits(steps: int, ranks: int) -> Iterator[tuple[int, ...]]:
    """All splits of consecutive steps over the ranks, as steps per rank."""
    for cuts in combinations(range(1, steps), ranks - 1):
        yield tuple(stop - start for start, stop in zip((0, *cuts), (*cuts, steps), strict=True))


def _neighbours(split: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Splits with one step moved to a neighbouring rank."""
    for cut in range(len(split) - 1):
        for move in (1, -1):
            steps = list(split)
            steps[cut] += move
            steps[cut + 1] -= move
            if min(steps) >= 1:
                yield tuple(steps)
