"""Which tasks make a rollout, what each needs, and the orders they may run in. Plain data, no tensors.

Two kinds of task make a whole rollout: `denoise(step, block)` takes a block one noise level down, and
`cache(step, block)` leaves the block's keys and values at its new level for later blocks to read. What a task needs
(`dependencies`) spans a graph; an order lists its tasks in groups of independent rows. `Plan.groups` writes the orders,
`check` proves one legal, `forwards` counts it. What it costs on one rank or several: `simulate`.

    matched graph   cache s holds blocks at noise level s + 1: step_first, stream, wavefront (the same result from each)
    clean graph     one cache of finished blocks serves every step: block_first (another result: the baseline)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

from ..common.checks import one_of, whole
from ..config.rollout import KV_SOURCES, ORDERS, RolloutConfig, require_order, require_windows, windows_per_step


class Task(NamedTuple):
    """One forward of the network on one block."""

    kind: Literal["denoise", "cache"]
    step: int
    block: int

    def __str__(self) -> str:
        return f"{self.kind}({self.step}, {self.block})"


Row = tuple[Task, ...]
"""One batch row of one forward: a task alone, or cache(s, n - 1) and denoise(s, n) fused into one."""

Group = tuple[Row, ...]
"""Rows that do not need each other, by rising step: they may run as one batch."""


def denoise(step: int, block: int) -> Task:
    """The task that takes a block from noise level `step` to `step + 1`."""
    return Task("denoise", step, block)


def cache(step: int, block: int) -> Task:
    """The task that leaves a block's keys and values at noise level `step + 1` in the cache of `step`."""
    return Task("cache", step, block)


@dataclass(frozen=True)
class Plan:
    """Which tasks there are, and in which order they run.

    steps               denoising steps S of the schedule
    order               step_first, stream, wavefront (one result) or block_first (clean context, the baseline)
    frames_per_block    latent frames made at once
    prefix_frames       given clean frames ahead of the first made one; block 0 is short where they fill no whole blocks
    window_frames       per step, how many frames a block sees with its own among them (None: all); () is None at every
                        step, `windows_per_step` turns one number into one per step
    sink_frames         first frames of the video that stay visible, inside the window's number
    kv_source           "own": cache tasks fill every cache. "next_step": cache s takes the keys of denoise(s + 1, .)
    fuse_cache_denoise  cache(s, n - 1) and denoise(s, n) are one row
    """

    steps: int
    order: str
    frames_per_block: int
    prefix_frames: int = 0
    window_frames: tuple[int | None, ...] = ()
    sink_frames: int = 0
    kv_source: str = "own"
    fuse_cache_denoise: bool = False

    def __post_init__(self) -> None:
        for name, fewest in (("steps", 1), ("frames_per_block", 1), ("prefix_frames", 0), ("sink_frames", 0)):
            object.__setattr__(self, name, whole(name, getattr(self, name), fewest))
        one_of("order", self.order, ORDERS)
        one_of("kv_source", self.kv_source, KV_SOURCES)
        windows = windows_per_step(None if self.window_frames == () else self.window_frames, self.steps)
        require_windows(windows, self.sink_frames, self.frames_per_block)
        object.__setattr__(self, "window_frames", windows)
        require_order(self.order, self.kv_source, self.fuse_cache_denoise)

    @classmethod
    def of(cls, config: RolloutConfig, prefix_frames: int = 0) -> Plan:
        """The tasks of a rollout behind a prefix of so many latent frames."""
        return cls(
            len(config.steps), config.order, config.frames_per_block, prefix_frames, config.windows, config.sink_frames,
            config.kv_source, config.fuse_cache_denoise,
        )  # fmt: skip

    # Geometry. Blocks are numbered from 0 with those of the prefix, frames from the start of the video.

    @property
    def prefix_blocks(self) -> int:
        """How many blocks the prefix fills; the first made block has this number."""
        return -(-self.prefix_frames // self.frames_per_block)

    @property
    def first_block_frames(self) -> int:
        """Frames of block 0: short where the prefix is no multiple of a block."""
        return self.prefix_frames % self.frames_per_block or self.frames_per_block

    def block_frames(self, block: int) -> tuple[int, int]:
        """The frames [start, stop) of a block."""
        stop = self.first_block_frames + block * self.frames_per_block
        return max(0, stop - self.frames_per_block), stop

    def block_of(self, frame: int) -> int:
        """The block that holds a frame."""
        return max(0, 1 + (frame - self.first_block_frames) // self.frames_per_block)

    def sees(self, step: int, block: int, other: int) -> bool:
        """Whether a block sees at least one frame of another at this step (itself: always; a later one: never)."""
        first, stop = self.block_frames(other)
        return other <= block and (stop > self._window_start(step, block) or first < self.sink_frames)

    def seen(self, step: int, block: int) -> list[int]:
        """The earlier blocks that a block sees at this step, rising; takes the time of a window, not of the video."""
        recent = min(block, self.block_of(max(0, self._window_start(step, block))))
        sink = self.block_of(self.sink_frames - 1) + 1 if self.sink_frames else 0
        return [*range(min(sink, recent)), *range(recent, block)]

    def visible_frames(self, step: int, block: int) -> int:
        """How many frames a task of the block sees at this step, its own among them."""
        start = max(0, self._window_start(step, block))
        return self.block_frames(block)[1] - start + min(start, self.sink_frames)

    def _window_start(self, step: int, block: int) -> int:
        """The first frame inside the sliding part of a block's window (may be negative)."""
        window = self.window_frames[step]
        return 0 if window is None else self.block_frames(block)[1] - (window - self.sink_frames)

    # The graph and its caches.

    @property
    def graph(self) -> Literal["matched", "clean"]:
        """The context a block sees: at its own noise level, or clean. Only orders of one graph give one result."""
        return "clean" if self.order == "block_first" else "matched"

    @property
    def caches(self) -> int:
        """How many caches are alive at once."""
        return self.steps if self.order in ("stream", "wavefront") else 1

    def cache_index(self, step: int) -> int:
        """Which of the `caches` a task at this step reads and writes."""
        return step if self.caches > 1 else 0

    def provider(self, step: int, block: int) -> Task:
        """The task that leaves in the cache of `step` what later blocks read there of `block`."""
        if self.graph == "clean":
            return cache(self.steps - 1, block)
        if self.kv_source == "next_step" and block >= self.prefix_blocks and step < self.steps - 1:
            return denoise(step + 1, block)
        return cache(step, block)

    def has_cache(self, step: int, block: int, num_blocks: int | None = None) -> bool:
        """Whether a video of num_blocks (None: endless) has cache(step, block): whether a later task reads it."""
        reader = max(block + 1, self.prefix_blocks)  # the next block that is denoised
        if (num_blocks is not None and reader >= num_blocks) or self.provider(step, block) != cache(step, block):
            return False
        # The next block looks back furthest: what it does not see, no later one sees (the sink is seen by all).
        if self.sees(step, block + 1, block):
            return True
        # The clean cache is read by the denoise tasks of every step, each with its own window.
        return self.graph == "clean" and any(self.sees(s, reader, block) for s in range(self.steps))

    # The orders.

    def groups(self, num_blocks: int | None) -> Iterator[Group]:
        """The tasks of a video of num_blocks blocks, those of the prefix among them (None: endless), group by group.

        Lazy: a group takes the memory and time of its own rows however long the video is. Cache tasks that nobody will
        read are left out, and with them the whole prefix of a video that has nothing to make.
        """
        if num_blocks is not None:
            whole("num_blocks", num_blocks, self.prefix_blocks, " (the blocks of the prefix count)")
        elif self.order == "step_first":
            raise ValueError(
                "order='step_first' cannot make an endless video (its first block waits for the last): "
                "give num_blocks, or use stream, wavefront or block_first"
            )
        return filter(None, _ORDERED[self.order](self, num_blocks))

    def _cache_group(self, block: int, num_blocks: int | None) -> Group:
        """All cache tasks of one block: independent once the block is denoised."""
        return tuple((cache(s, block),) for s in range(self.steps) if self.has_cache(s, block, num_blocks))

    def _denoise_row(self, step: int, block: int, num_blocks: int | None) -> Row:
        """A denoise task; fused with the cache task of the block before it, where there is one."""
        if self.fuse_cache_denoise and block > 0 and self.has_cache(step, block - 1, num_blocks):
            return cache(step, block - 1), denoise(step, block)
        return (denoise(step, block),)

    def _lone_prefix(self) -> range:
        """The prefix blocks whose cache tasks stand alone: those of the last one fuse with the first denoise tasks."""
        return range(self.prefix_blocks - 1 if self.fuse_cache_denoise else self.prefix_blocks)

    def _made(self, num_blocks: int | None) -> Iterable[int]:
        """The blocks to be made."""
        return count(self.prefix_blocks) if num_blocks is None else range(self.prefix_blocks, num_blocks)


def _step_first(plan: Plan, num_blocks: int | None) -> Iterator[Group]:
    """All blocks at step 0, then all at step 1, ...: one cache at a time."""
    for s in range(plan.steps):
        yield from (((cache(s, n),),) for n in plan._lone_prefix() if plan.has_cache(s, n, num_blocks))
        for n in plan._made(num_blocks):
            yield (plan._denoise_row(s, n, num_blocks),)
            if not plan.fuse_cache_denoise and plan.has_cache(s, n, num_blocks):
                yield ((cache(s, n),),)


def _stream(plan: Plan, num_blocks: int | None) -> Iterator[Group]:
    """Block by block through all steps, cache tasks once a block is finished. In the clean graph: block_first."""
    for n in plan._lone_prefix():
        yield plan._cache_group(n, num_blocks)
    for n in plan._made(num_blocks):
        for s in range(plan.steps):
            yield (plan._denoise_row(s, n, num_blocks),)
        if not plan.fuse_cache_denoise:
            yield plan._cache_group(n, num_blocks)


def _wavefront(plan: Plan, num_blocks: int | None) -> Iterator[Group]:
    """Diagonals: with n counted from the first made block, denoise(s, n) at time s + 2n and cache(s, n) one later.

    Fused, denoise(s, n) is at time s + n. A step's tasks come at different times, so no group holds a step twice.
    """
    for n in plan._lone_prefix():
        yield plan._cache_group(n, num_blocks)
    pace = 1 if plan.fuse_cache_denoise else 2
    made = None if num_blocks is None else num_blocks - plan.prefix_blocks
    for time in count() if made is None else range(plan.steps + pace * (made - 1)):
        rows: list[Row] = []
        for s in range(min(plan.steps, time + 1)):
            ahead, late = divmod(time - s, pace)
            n = plan.prefix_blocks + ahead
            if made is not None and ahead >= made:
                continue
            if not late:
                rows.append(plan._denoise_row(s, n, num_blocks))
            elif plan.has_cache(s, n, num_blocks):
                rows.append((cache(s, n),))
        yield tuple(rows)


_ORDERED: dict[str, Callable[[Plan, int | None], Iterator[Group]]] = {
    "step_first": _step_first,
    "stream": _stream,
    "wavefront": _wavefront,
    "block_first": _stream,
}


def dependencies(plan: Plan, task: Task) -> frozenset[Task]:
    """The tasks that must be done before this one. A fused row itself meets the need for cache(s, n - 1)."""
    step, block = task.step, task.block
    needs = {plan.provider(step, m) for m in plan.seen(step, block)}
    if task.kind == "denoise" and step > 0:
        needs.add(denoise(step - 1, block))
    if task.kind == "cache" and block >= plan.prefix_blocks:  # prefix blocks are given, not denoised
        needs.add(denoise(step, block))
    return frozenset(needs)


def check(plan: Plan, groups: Iterable[Group], num_blocks: int) -> None:
    """Prove that an order makes a video of num_blocks blocks (those of the prefix among them) in a legal way.

    Legal: each task finds what it needs in earlier groups or ahead of it in its row; none comes twice; every made
    block is denoised at every step; every cache task is read by some task; no two rows of a group touch one cache;
    and each cache goes forward only, since new frames overwrite old ones.

    Raises:
        ValueError: names the first task that breaks the rules and what it lacks.
    """
    whole("num_blocks", num_blocks, plan.prefix_blocks, " (the blocks of the prefix count)")
    done: set[Task] = set()
    read: set[Task] = set()
    order: list[Task] = []
    reached: dict[int, tuple[int, int]] = {}  # how far each cache has come: (pass, block)
    for group in groups:
        holder: dict[int, Task] = {}  # which row of this group touches a cache, by its last task
        fresh: set[Task] = set()
        for row in group:
            _check_row(row)
            for task in row:
                _check_task(plan, task, num_blocks)
                if task in done or task in fresh:
                    raise ValueError(f"{task} comes twice")
                needs = dependencies(plan, task)
                lacking = needs - done - set(row[: row.index(task)])
                if lacking:
                    raise ValueError(f"{task} needs {min(lacking)}, which is in no earlier group")
                read |= needs
                fresh.add(task)
                order.append(task)
            for index in sorted({index for task in row for index in _caches_touched(plan, task)}):
                if index in holder:
                    raise ValueError(f"{row[-1]} and {holder[index]} are two rows of a group on one cache ({index})")
                holder[index] = row[-1]
                for task in row:
                    place = (task.step if plan.order == "step_first" else 0, task.block)
                    if place < reached.get(index, place):
                        raise ValueError(f"{task} comes too late: cache {index} has already gone on to later frames")
                    reached[index] = place
        done |= fresh
    for block in range(plan.prefix_blocks, num_blocks):
        for step in range(plan.steps):
            if denoise(step, block) not in done:
                raise ValueError(f"{denoise(step, block)} is missing: every made block needs all {plan.steps} steps")
    for task in order:
        if task.kind == "cache" and task not in read:
            raise ValueError(f"{task} is needless: no later task reads it")


def forwards(groups: Iterable[Group]) -> int:
    """How many tasks there are in these groups; a fused row counts two."""
    return sum(len(row) for group in groups for row in group)


def rank_order(group: Group) -> list[Row]:
    """The rows of a group one after another, as a rank that runs them singly should: the oldest block first, since a
    younger one could not go on without it; within a block denoise tasks first, since other ranks wait for the latents.
    """
    return sorted(group, key=lambda row: (row[-1].block, row[-1].kind != "denoise"))


def _caches_touched(plan: Plan, task: Task) -> set[int]:
    """The caches in which a task reads or writes."""
    shares = plan.kv_source == "next_step" and task.kind == "denoise" and task.step > 0
    return {plan.cache_index(s) for s in ((task.step - 1, task.step) if shares else (task.step,))}


def _check_row(row: Row) -> None:
    if len(row) == 1:
        return
    if not row or row != (cache(row[-1].step, row[-1].block - 1), denoise(row[-1].step, row[-1].block)):
        text = ", ".join(map(str, row))
        raise ValueError(f"({text}) is no row: give one task, or cache(s, n - 1) and denoise(s, n)")


def _check_task(plan: Plan, task: Task, num_blocks: int) -> None:
    """Refuse what is no task of this video at all."""
    if task.kind not in ("denoise", "cache"):
        raise ValueError(f"{task} is of no known kind: give denoise or cache")
    if not 0 <= task.step < plan.steps:
        raise ValueError(f"{task} is outside the schedule: steps are 0 to {plan.steps - 1}")
    if not 0 <= task.block < num_blocks:
        raise ValueError(f"{task} is outside the video: blocks are 0 to {num_blocks - 1}")
    if task.kind == "denoise" and task.block < plan.prefix_blocks:
        raise ValueError(f"{task} denoises a block of the prefix: made blocks start at {plan.prefix_blocks}")
