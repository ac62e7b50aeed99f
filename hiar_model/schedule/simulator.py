"""When each task of an order would run on one rank or a pipeline of ranks: a simulation, without tensors.

A rank holds a run of successive steps and takes its rows in that order, those of a group in `rank_order`. A
row starts when its rank is free and all it needs has arrived. Transfers run beside the ranks' work; a link between two
ranks carries one message at a time in each direction. Nothing else is modelled.
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
MOST_SPLITS = 20_000  # what is enumerated; beyond it the split with the best bound is taken and improved
MOST_TRIALS = 40  # simulations of one search
ROUNDING = 1e-9


class Event(NamedTuple):
    """Rows that one rank runs from start to end; no rows: it decodes the pixels of block `decoded`."""

    rank: int
    rows: Group
    start: float
    end: float
    decoded: int | None = None


@dataclass(frozen=True)
class Timeline:
    """What a simulation found. Times in the unit of the costs.

    split        steps that each rank holds (the rank that only decodes holds none and is not in it)
    ranks        ranks in use
    events       in the order in which they were simulated
    bytes_sent   by all ranks
    least        no split of these ranks can take less time (0 where that was not asked for)
    level_from   the first block whose tasks cost as much as the last one's: from there on windows are full
    """

    plan: Plan
    num_blocks: int
    split: tuple[int, ...]
    ranks: int
    events: tuple[Event, ...]
    bytes_sent: float
    least: float
    level_from: int

    @cached_property
    def time(self) -> float:
        """From the first start to the last end."""
        return max((event.end for event in self.events), default=0.0)

    @cached_property
    def begun(self) -> dict[int, float]:
        """When the first denoise task of each made block starts."""
        return {v.block: e.start for e in self.events for row in e.rows for v in row if v[:2] == ("denoise", 0)}

    @cached_property
    def finished(self) -> dict[int, float]:
        """When each made block is there: its pixels where they are decoded, else its latents."""
        pixels = {e.decoded: e.end for e in self.events if e.decoded is not None}
        last = ("denoise", self.plan.steps - 1)
        latents = {v.block: e.end for e in self.events for row in e.rows for v in row if v[:2] == last}
        return {block: pixels.get(block, end) for block, end in latents.items()}

    @property
    def first_block(self) -> float:
        """How long the first block takes from the start."""
        return self.finished[self.plan.prefix_blocks]

    @property
    def _steady(self) -> range:
        """Blocks n, with n + 1, away from both ends of the video and behind the growth of the window."""
        if self.plan.order == "step_first":
            return range(0)  # its blocks all come in the last pass
        margin = 1 if len(self.split) == 1 and self.plan.order != "wavefront" else self.plan.steps
        return range(self.level_from + margin, self.num_blocks - 1 - margin)

    @property
    def steady_interval(self) -> float | None:
        """Mean time between two finished blocks in the steady state; None where the video is too short to have one."""
        steady = self._steady
        if not steady:
            return None
        return (self.finished[steady.stop] - self.finished[steady.start]) / len(steady)

    @property
    def prompt_delay(self) -> float | None:
        """From a change of the prompt to the end of the first block it reaches, at worst, in the steady state.

        A block keeps the prompt it began with. At worst the change comes just behind the start of a block: the next one
        is the first to show it.
        """
        return max((self.finished[n + 1] - self.begun[n] for n in self._steady), default=None)

    @cached_property
    def utilisation(self) -> tuple[float, ...]:
        """The share of the time in which each rank works."""
        busy = [0.0] * self.ranks
        for event in self.events:
            busy[event.rank] += event.end - event.start
        return tuple(b / self.time if self.time else 0.0 for b in busy)


class Makespan(NamedTuple):
    """The time an order takes, and how many steps each rank then holds."""

    time: float
    steps_per_rank: tuple[int, ...]


def makespan(
    plan: Plan,
    num_blocks: int,
    ranks: int,
    denoise: float = 1.0,
    cache: float = 1.0,
    send_latent: float = 0.0,
    send_keys: float = 0.0,
) -> Makespan:
    """The time of an order at unit costs on `ranks` ranks, with the best split of the steps over them.

    Args:
        denoise, cache: the time of a task; a fused row takes both, and its latents are there when it ends.
        send_latent: the time for latents to reach another rank.
        send_keys: the time for lent keys (kv_source="next_step") to reach another rank.
    """
    costs = unit_costs(denoise, cache, send_latent=send_latent, send_keys=send_keys)
    found = simulate(plan, num_blocks, ranks, costs)
    return Makespan(found.time, found.split)


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
    """The timeline of a video of num_blocks blocks, those of the prefix among them.

    Args:
        split: steps per rank; or how many ranks, for the fastest split found (see `TaskOrder.best_split`).
        costs: None: every task takes 1, transfers nothing.
        vae: "none": latents are the result. "last": the last rank decodes each block once it is denoised. "own": a
            further rank decodes.
        batch: one rank runs the rows of a group as one launch (see `Costs.batch`).
        in_flight: a block starts only when all but so many - 1 before it are finished (None: no limit). Without it
            the ranks ahead of the slowest one run ever further ahead of it.

    Raises:
        ValueError: names what is not legal.
    """
    tasks = TaskOrder(
        plan, num_blocks, unit_costs() if costs is None else costs, vae=vae, batch=batch, in_flight=in_flight
    )
    return tasks.timeline(split)


class _Job(NamedTuple):
    """Rows run at once, as the simulation needs them.

    `step` tells the rank, `sources` are jobs of other steps, `readers` the steps that need this one; `behind` is a job
    that must have ended, though nothing is sent.
    """

    step: int
    cost: float
    rows: Group
    sources: tuple[int, ...]
    readers: tuple[int, ...]
    decoded: int | None
    behind: int | None


class TaskOrder:
    """The tasks of a video in order, with their costs, ready to be simulated on one split after another.

    Arguments as for `simulate`.
    """

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
        whole("num_blocks", num_blocks, plan.prefix_blocks, " (the blocks of the prefix count)")
        one_of("vae", vae, VAE)
        if in_flight is not None:
            whole("in_flight", in_flight, 1)
        costs.check(plan)
        self.in_flight = in_flight
        self.plan, self.num_blocks, self.costs, self.vae, self.batch = plan, num_blocks, costs, vae, batch
        self.jobs = self._jobs()

    def timeline(self, split: int | Sequence[int]) -> Timeline:
        """Simulate one split, or the fastest one of so many ranks."""
        plan, least = self.plan, 0.0
        ranks = as_whole(split)
        if ranks is not None:
            self._check_ranks(ranks)
            steps_per_rank, least = self.best_split(ranks)
        else:
            steps_per_rank = tuple(split)  # type: ignore[arg-type]
            self._check_ranks(len(steps_per_rank))
            if sum(steps_per_rank) != plan.steps or min(steps_per_rank) < 1:
                raise ValueError(f"split={steps_per_rank} is not legal: give steps >= 1 that sum to {plan.steps}")
        owner = self._owners(steps_per_rank)
        starts, ends, sent = self._run(owner)
        events = [
            Event(owner[job.step], job.rows, start, end, job.decoded)
            for job, start, end in zip(self.jobs, starts, ends, strict=True)
        ]
        ranks = len(steps_per_rank) + (self.vae == "own")
        return Timeline(plan, self.num_blocks, steps_per_rank, ranks, tuple(events), sent, least, self._level_from())

    def best_split(self, ranks: int) -> tuple[tuple[int, ...], float]:
        """The fastest split found, and a time that no split can beat; where the two meet, none is faster.

        A rank cannot start before the first latents have come through the steps ahead of it, does all its work, and
        then the last block still has the steps behind it to go. The largest of these sums over the ranks bounds a split
        from below, and since each depends on one rank's steps alone, dynamic programming finds the split with the least
        bound. If its time meets the bound, that is the end. If not, splits are simulated by rising bound until none
        left can win; where there are too many to list, single steps are moved between neighbours while that helps.
        """
        bound = _Bounds(self, ranks)
        best, least = bound.least_split()
        time = self._time(best)
        if time <= least * (1 + ROUNDING):
            return best, least
        if comb(self.plan.steps - 1, ranks - 1) <= MOST_SPLITS:
            ranked = sorted((bound.of(split), split) for split in _splits(self.plan.steps, ranks))
            for tried, (lower, split) in enumerate(ranked):
                if lower >= time * (1 - ROUNDING):
                    break
                if tried == MOST_TRIALS:
                    return best, lower
                found = self._time(split)
                if found < time * (1 - ROUNDING):
                    best, time = split, found
            return best, time
        trials = 0
        todo = sorted(_neighbours(best), key=bound.of)
        while todo and trials < MOST_TRIALS:
            split, trials = todo.pop(0), trials + 1
            found = self._time(split) if bound.of(split) < time * (1 - ROUNDING) else time
            if found < time * (1 - ROUNDING):
                best, time, todo = split, found, sorted(_neighbours(split), key=bound.of)
        return best, least

    def _check_ranks(self, ranks: int) -> None:
        whole("ranks", ranks, 1)
        if ranks > self.plan.steps:
            raise ValueError(f"ranks={ranks} is more than there are steps: give 1 to {self.plan.steps}")
        if ranks > 1 and self.plan.graph == "clean":
            raise ValueError(
                f"ranks={ranks} is impossible with order='block_first' (all steps share one cache): give 1"
            )
        if ranks > 1 and self.batch:
            raise ValueError(f"ranks={ranks} is impossible with batch=True: give 1")

    def _owners(self, split: tuple[int, ...]) -> list[int]:
        """The rank of each step, and of the decoder behind the last one."""
        owner = [rank for rank, steps in enumerate(split) for _ in range(steps)]
        return [*owner, len(split) - (self.vae != "own")]

    def _jobs(self) -> list[_Job]:
        """The rows in the order in which ranks take them up."""
        plan, costs = self.plan, self.costs
        made_by: dict[Task, int] = {}
        jobs: list[_Job] = []
        readers: list[set[int]] = []
        finishing: dict[int, int] = {}  # block -> the job that finishes it

        def add(step: int, cost: float, rows: Group, needs: set[Task], decoded: int | None = None) -> None:
            # What comes from the same step comes from the same rank, which keeps the order anyway.
            sources = tuple({made_by[need] for need in needs if need.step != step or decoded is not None})
            for source in sources:
                readers[source].add(step)
            made_by.update((task, len(jobs)) for row in rows for task in row)
            jobs.append(_Job(step, cost, rows, sources, (), decoded, None))
            readers.append(set())

        for group in plan.groups(self.num_blocks):
            rows = rank_order(group)
            for part in [tuple(rows)] if self.batch else [(row,) for row in rows]:
                factor = costs.batch[min(len(part), len(costs.batch)) - 1] if self.batch else 1.0
                add(part[0][-1].step, factor * sum(costs.row(plan, row) for row in part), part, self._imports(part))
                for row in part:
                    if row[-1].kind == "denoise" and row[-1].step == plan.steps - 1:
                        if self.vae != "none":
                            add(plan.steps, costs.decode, (), {row[-1]}, row[-1].block)
                        finishing[row[-1].block] = len(jobs) - 1
        return [
            job._replace(readers=tuple(found), behind=self._behind(index, job, finishing))
            for index, (job, found) in enumerate(zip(jobs, readers, strict=True))
        ]

    def _behind(self, index: int, job: _Job, finishing: dict[int, int]) -> int | None:
        """The job that must have ended before this one may start a new block, where blocks in flight are limited."""
        begun = [v.block for row in job.rows for v in row if v[:2] == ("denoise", 0)]
        if self.in_flight is None or not begun or begun[0] - self.in_flight < self.plan.prefix_blocks:
            return None
        found = finishing[begun[0] - self.in_flight]
        if found > index:
            raise ValueError(
                f"in_flight={self.in_flight} is impossible with order={self.plan.order!r} of {self.plan.steps} steps: "
                "give more, or order='stream'"
            )
        return found

    def _imports(self, rows: Group) -> set[Task]:
        """What rows need, of other steps at least: with own caches latents alone come from other steps."""
        if self.plan.kv_source == "own":
            return {denoise(v.step - 1, v.block) for row in rows for v in row if v.kind == "denoise" and v.step}
        return {need for row in rows for task in row for need in dependencies(self.plan, task)}

    def _time(self, split: tuple[int, ...]) -> float:
        return max(self._run(self._owners(split))[1], default=0.0)

    def _run(self, owner: list[int]) -> tuple[list[float], list[float], float]:
        """When each job starts and ends, and how many bytes were sent. One pass: jobs stand behind what they need."""
        free = [0.0] * (max(owner) + 1)
        link_free: dict[tuple[int, int], float] = {}
        arrived: dict[tuple[int, int], float] = {}  # (job, rank)
        starts: list[float] = []
        ends: list[float] = []
        sent = 0.0
        for index, job in enumerate(self.jobs):
            rank = owner[job.step]
            start = free[rank] if job.behind is None else max(free[rank], ends[job.behind])
            for source in job.sources:
                if owner[self.jobs[source].step] != rank:
                    start = max(start, arrived[source, rank])
            free[rank] = end = start + job.cost
            starts.append(start)
            ends.append(end)
            for other in {owner[step] for step in job.readers} - {rank}:
                message = self.costs.latents if other > rank else self.costs.keys  # keys are lent to the step before
                leaves = max(end, link_free.get((rank, other), 0.0)) + message.busy
                link_free[rank, other], arrived[index, other] = leaves, leaves + message.delay
                sent += message.nbytes
        return starts, ends, sent

    def _level_from(self) -> int:
        """The first of the blocks that see as much as the last one, at the steps where that costs."""
        plan, last = self.plan, self.num_blocks - 1
        curves = [(s, self.costs.curve(kind, s)) for s in range(plan.steps) for kind in ("denoise", "cache")]
        steps = sorted({s for s, curve in curves if len(curve.points) > 1})

        def settled(block: int) -> bool:
            return all(plan.visible_frames(s, block) == plan.visible_frames(s, last) for s in steps)

        return bisect_left(range(last), True, lo=min(plan.prefix_blocks, max(last, 0)), key=settled)


class _Bounds:
    """The least time of a split, rank by rank; see `TaskOrder.best_split`."""

    def __init__(self, tasks: TaskOrder, ranks: int) -> None:
        steps, plan = tasks.plan.steps, tasks.plan
        self.steps, self.ranks = steps, ranks
        self.work = [0.0] * (steps + 1)  # the last: decoding
        first, last = [0.0] * (steps + 1), [0.0] * (steps + 1)
        for job in tasks.jobs:
            self.work[job.step] += job.cost
            blocks = (
                {job.decoded} if job.decoded is not None else {r[-1].block for r in job.rows if r[-1].kind == "denoise"}
            )
            if plan.prefix_blocks in blocks and not plan.prefix_blocks:  # a given prefix is work without any wait
                first[job.step] = job.cost
            if tasks.num_blocks - 1 in blocks:
                last[job.step] = job.cost
        self.ahead = [sum(first[:s]) for s in range(steps + 1)]
        self.behind = [sum(last[s:]) for s in range(steps + 1)]
        latents = tasks.costs.latents
        self.hop = latents.busy + latents.delay
        self.vae = tasks.vae

    def rank(self, rank: int, start: int, stop: int) -> float:
        """What the rank that holds steps [start, stop) makes the whole take at least."""
        work = sum(self.work[start:stop])
        hops, behind = self.ranks - 1 - rank + (self.vae == "own"), self.behind[stop]
        if rank == self.ranks - 1 and self.vae == "last":
            work, behind = work + self.work[self.steps], 0.0
        return self.ahead[start] + work + behind + self.hop * (hops + (rank if self.ahead[start] else 0))

    def of(self, split: tuple[int, ...]) -> float:
        """Of a whole split."""
        stops = [sum(split[: rank + 1]) for rank in range(len(split))]
        return max(self.rank(rank, stop - split[rank], stop) for rank, stop in enumerate(stops))

    def least_split(self) -> tuple[tuple[int, ...], float]:
        """The split with the least bound, and that bound.

        Of equals the one with most steps on the first ranks: behind a slow rank nothing piles up.
        """
        last = self.ranks - 1
        rest = {start: self.rank(last, start, self.steps) for start in range(last, self.steps)}
        least = {last: rest}  # least[rank][start]: of the ranks from `rank` on, which hold the steps from `start` on
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
    """All ways to give each rank a run of successive steps, as steps per rank."""
    for cuts in combinations(range(1, steps), ranks - 1):
        yield tuple(stop - start for start, stop in zip((0, *cuts), (*cuts, steps), strict=True))


def _neighbours(split: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Splits with one step moved over one cut."""
    for cut in range(len(split) - 1):
        for move in (1, -1):
            steps = list(split)
            steps[cut] += move
            steps[cut + 1] -= move
            if min(steps) >= 1:
                yield tuple(steps)
