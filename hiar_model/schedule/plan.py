"""The tasks of a rollout, their dependencies, and the orders in which they may run. Plain data, no tensors.

A rollout is made of two kinds of task: `denoise(step, block)` takes a block one noise level down, and
`cache(step, block)` stores the block's keys and values at its new level for later blocks. `dependencies` gives the
edges of the task graph; a task order is a sequence of groups of independent batch items. `Plan.groups` lists an order,
`check` verifies one, `forwards` counts its tasks, `simulate` predicts its time on one or several ranks.

    matched graph   cache s holds blocks at noise level s + 1: step_first, stream, wavefront (all give the same result)
    clean graph     one cache of finished blocks serves every step: block_first (the baseline, with another result)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple

from ..common.checks import one_of, whole
from ..config.rollout import KV_SOURCES, ORDERS, RolloutConfig, require_order, require_windows, windows_per_step


class Task(NamedTuple):
    """One forward of the network on one block."""

    kind: Literal["denoise", "cache"]
    step: int
    block: int

    def __str__(self) -> str:
        return f"{self.kind}({self.step}, {self.block})"


BatchItem = tuple[Task, ...]
"""One item of a forward's batch: a single task, or cache(s, n - 1) and denoise(s, n) fused."""

Group = tuple[BatchItem, ...]
"""Batch items that do not depend on each other, by rising step: they may run as one batch."""


def denoise(step: int, block: int) -> Task:
    """The task that takes a block from noise level `step` to `step + 1`."""
    return Task("denoise", step, block)


def cache(step: int, block: int) -> Task:
    """The task that stores a block's keys and values at noise level `step + 1` in the cache of `step`."""
    return Task("cache", step, block)


@dataclass(frozen=True)
class Plan:
    """The tasks of a rollout and their order; frames are latent frames.

    Args:
        steps: number of denoising steps S.
        order: "step_first", "stream", "wavefront" (the same result) or "block_first" (clean context, the baseline).
        frames_per_block: frames generated at once.
        prefix_frames: clean conditioning frames before the first generated one; block 0 is short where they do not fill
            whole blocks.
        window_frames: for each step, how many frames a block sees, its own included (None: all); () is None at every
            step. `windows_per_step` turns one number into one per step.
        sink_frames: first frames of the video that stay visible; they count towards the window.
        kv_source: "own": cache tasks fill every cache. "next_step": cache s takes the keys of denoise(s + 1, .).
        fuse_cache_denoise: cache(s, n - 1) and denoise(s, n) are one batch item.

    Raises:
        ValueError: an illegal value or combination, with the legal values.

    Example:
        >>> plan = Plan(steps=2, order="stream", frames_per_block=3)
        >>> [" ".join(str(task) for item in group for task in item) for group in plan.groups(2)]
        ['denoise(0, 0)', 'denoise(1, 0)', 'cache(0, 0) cache(1, 0)', 'denoise(0, 1)', 'denoise(1, 1)']
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
        """The plan of a rollout after a prefix of `prefix_frames` latent frames."""
        return cls(
            len(config.steps), config.order, config.frames_per_block, prefix_frames, config.windows, config.sink_frames,
            config.kv_source, config.fuse_cache_denoise,
        )  # fmt: skip

    # Geometry. Blocks are numbered from 0 with those of the prefix, frames from the start of the video.

    @property
    def prefix_blocks(self) -> int:
        """Number of blocks of the prefix, which is the index of the first generated block."""
        return -(-self.prefix_frames // self.frames_per_block)

    @property
    def first_block_frames(self) -> int:
        """Frames of block 0; fewer than a block where the prefix is not a whole number of blocks."""
        return self.prefix_frames % self.frames_per_block or self.frames_per_block

    def block_frames(self, block: int) -> tuple[int, int]:
        """The frames [start, stop) of a block."""
        stop = self.first_block_frames + block * self.frames_per_block
        return max(0, stop - self.frames_per_block), stop

    def block_of(self, frame: int) -> int:
        """The block that a frame belongs to."""
        return max(0, 1 + (frame - self.first_block_frames) // self.frames_per_block)

    def sees(self, step: int, block: int, other: int) -> bool:
        """Whether a block sees any frame of `other` at this step (itself: always; a later block: never)."""
        first, stop = self.block_frames(other)
        return other <= block and (stop > self._window_start(step, block) or first < self.sink_frames)

    def seen(self, step: int, block: int) -> list[int]:
        """The earlier blocks that a block sees at this step, rising; O(window), however long the video is."""
        recent = min(block, self.block_of(max(0, self._window_start(step, block))))
        sink = self.block_of(self.sink_frames - 1) + 1 if self.sink_frames else 0
        return [*range(min(sink, recent)), *range(recent, block)]

    def visible_frames(self, step: int, block: int) -> int:
        """How many frames a task of the block sees at this step, its own included."""
        start = max(0, self._window_start(step, block))
        return self.block_frames(block)[1] - start + min(start, self.sink_frames)

    def _window_start(self, step: int, block: int) -> int:
        """The first frame inside the sliding part of a block's window (may be negative)."""
        window = self.window_frames[step]
        return 0 if window is None else self.block_frames(block)[1] - (window - self.sink_frames)

    def block_causal(self, windows: int | None | tuple[int | None, ...]) -> dict[str, Any]:
        """The visibility rule with these windows, as :class:`hiar_kernels.BlockCausal` takes it."""
        return {
            "frames_per_block": self.frames_per_block, "first_block_frames": self.first_block_frames,
            "window_frames": windows, "sink_frames": self.sink_frames,
        }  # fmt: skip

    # The graph and its caches.

    @property
    def graph(self) -> Literal["matched", "clean"]:
        """The context of a block: at its own noise level, or clean. Orders of the same graph give the same result."""
        return "clean" if self.order == "block_first" else "matched"

    @property
    def caches(self) -> int:
        """Number of caches in memory at once."""
        return self.steps if self.order in ("stream", "wavefront") else 1

    def cache_index(self, step: int) -> int:
        """Index of the cache that tasks of this step read and write."""
        return step if self.caches > 1 else 0

    def provider(self, step: int, block: int) -> Task:
        """The task that writes the keys and values of `block` that later blocks read in the cache of `step`."""
        if self.graph == "clean":
            return cache(self.steps - 1, block)
        if self.kv_source == "next_step" and block >= self.prefix_blocks and step < self.steps - 1:
            return denoise(step + 1, block)
        return cache(step, block)

    def has_cache(self, step: int, block: int, num_blocks: int | None = None) -> bool:
        """Whether cache(step, block) has a reader, so is part of a video of num_blocks blocks (None: endless)."""
        reader = max(block + 1, self.prefix_blocks)  # the next block that is denoised
        if (num_blocks is not None and reader >= num_blocks) or self.provider(step, block) != cache(step, block):
            return False
        # The next block looks back furthest: what it does not see, no later block sees (all see the sink).
        if self.sees(step, block + 1, block):
            return True
        # The denoise tasks of every step read the clean cache, each with its own window.
        return self.graph == "clean" and any(self.sees(s, reader, block) for s in range(self.steps))

    # Task orders.

    def groups(self, num_blocks: int | None) -> Iterator[Group]:
        """The groups of a video of num_blocks blocks, prefix included (None: endless), in order.

        Lazy: time and memory of a group do not depend on the length of the video. Cache tasks without a reader are left
        out; a video that is all prefix has no tasks.
        """
        if num_blocks is not None:
            whole("num_blocks", num_blocks, self.prefix_blocks, " (the prefix included)")
        elif self.order == "step_first":
            raise ValueError(
                "an endless video is impossible with order='step_first': give num_blocks, or use stream, wavefront or "
                "block_first"
            )
        return filter(None, _ORDERS[self.order](self, num_blocks))

    def _cache_group(self, block: int, num_blocks: int | None) -> Group:
        """All cache tasks of one block, which are independent once the block is finished."""
        return tuple((cache(s, block),) for s in range(self.steps) if self.has_cache(s, block, num_blocks))

    def _denoise_item(self, step: int, block: int, num_blocks: int | None) -> BatchItem:
        """A denoise task, fused with the cache task of the block before it where the plan says so."""
        if self.fuse_cache_denoise and block > 0 and self.has_cache(step, block - 1, num_blocks):
            return cache(step, block - 1), denoise(step, block)
        return (denoise(step, block),)

    def _unfused_prefix(self) -> range:
        """Prefix blocks with cache tasks of their own: all but the last, if that one is fused with denoise tasks."""
        return range(self.prefix_blocks - 1 if self.fuse_cache_denoise else self.prefix_blocks)

    def _generated(self, num_blocks: int | None) -> Iterable[int]:
        """The blocks to generate."""
        return count(self.prefix_blocks) if num_blocks is None else range(self.prefix_blocks, num_blocks)


def _step_first(plan: Plan, num_blocks: int | None) -> Iterator[Group]:
    """All blocks at step 0, then all at step 1, and so on: one cache at a time."""
    for s in range(plan.steps):
        yield from (((cache(s, n),),) for n in plan._unfused_prefix() if plan.has_cache(s, n, num_blocks))
        for n in plan._generated(num_blocks):
            yield (plan._denoise_item(s, n, num_blocks),)
            if not plan.fuse_cache_denoise and plan.has_cache(s, n, num_blocks):
                yield ((cache(s, n),),)


def _stream(plan: Plan, num_blocks: int | None) -> Iterator[Group]:
    """Block by block through all steps, then the block's cache tasks. In the clean graph this is block_first."""
    for n in plan._unfused_prefix():
        yield plan._cache_group(n, num_blocks)
    for n in plan._generated(num_blocks):
        for s in range(plan.steps):
            yield (plan._denoise_item(s, n, num_blocks),)
        if not plan.fuse_cache_denoise:
            yield plan._cache_group(n, num_blocks)


def _wavefront(plan: Plan, num_blocks: int | None) -> Iterator[Group]:
    """Diagonals: with n counted from the first generated block, denoise(s, n) at time s + 2n and cache(s, n) one later.

    With fusion denoise(s, n) is at time s + n. No two tasks of a step have the same time, so no group has a step twice.
    """
    for n in plan._unfused_prefix():
        yield plan._cache_group(n, num_blocks)
    pace = 1 if plan.fuse_cache_denoise else 2
    total = None if num_blocks is None else num_blocks - plan.prefix_blocks
    for time in count() if total is None else range(plan.steps + pace * (total - 1)):
        items: list[BatchItem] = []
        for s in range(min(plan.steps, time + 1)):
            ahead, late = divmod(time - s, pace)
            n = plan.prefix_blocks + ahead
            if total is not None and ahead >= total:
                continue
            if not late:
                items.append(plan._denoise_item(s, n, num_blocks))
            elif plan.has_cache(s, n, num_blocks):
                items.append((cache(s, n),))
        yield tuple(items)


_ORDERS: dict[str, Callable[[Plan, int | None], Iterator[Group]]] = {
    "step_first": _step_first,
    "stream": _stream,
    "wavefront": _wavefront,
    "block_first": _stream,
}


def dependencies(plan: Plan, task: Task) -> frozenset[Task]:
    """The tasks that must run before this one; of a fused item, the first task comes before the second."""
    step, block = task.step, task.block
    needs = {plan.provider(step, m) for m in plan.seen(step, block)}
    if task.kind == "denoise" and step > 0:
        needs.add(denoise(step - 1, block))
    if task.kind == "cache" and block >= plan.prefix_blocks:  # prefix blocks are never denoised
        needs.add(denoise(step, block))
    return frozenset(needs)


def check(plan: Plan, groups: Iterable[Group], num_blocks: int) -> None:
    """Verify that a task order makes a video of num_blocks blocks, prefix included.

    The dependencies of a task come in earlier groups or before it in its batch item; no task comes twice; every
    generated block is denoised at every step; every cache task has a reader; no two items of a group use one cache;
    and each cache only moves forward, since new frames overwrite old ones.

    Raises:
        ValueError: names the first task that breaks a rule.
    """
    whole("num_blocks", num_blocks, plan.prefix_blocks, " (the prefix included)")
    done: set[Task] = set()
    read: set[Task] = set()
    order: list[Task] = []
    progress: dict[int, tuple[int, int]] = {}  # cache -> the last (pass, block) it has seen
    for group in groups:
        users: dict[int, Task] = {}  # cache -> the last task of this group's item that uses it
        fresh: set[Task] = set()
        for item in group:
            _check_item(item)
            for task in item:
                _check_task(plan, task, num_blocks)
                if task in done or task in fresh:
                    raise ValueError(f"{task} comes twice")
                needs = dependencies(plan, task)
                lacking = needs - done - set(item[: item.index(task)])
                if lacking:
                    raise ValueError(f"{task} needs {min(lacking)}, which is in no earlier group")
                read |= needs
                fresh.add(task)
                order.append(task)
            for index in sorted({index for task in item for index in _caches_used(plan, task)}):
                if index in users:
                    raise ValueError(f"{item[-1]} and {users[index]} are in one group and both use cache {index}")
                users[index] = item[-1]
                for task in item:
                    position = (task.step if plan.order == "step_first" else 0, task.block)
                    if position < progress.get(index, position):
                        raise ValueError(f"{task} comes too late: cache {index} already holds later frames")
                    progress[index] = position
        done |= fresh
    for block in range(plan.prefix_blocks, num_blocks):
        for step in range(plan.steps):
            if denoise(step, block) not in done:
                raise ValueError(
                    f"{denoise(step, block)} is missing: each generated block needs all {plan.steps} steps"
                )
    for task in order:
        if task.kind == "cache" and task not in read:
            raise ValueError(f"{task} is needless: no task reads it")


def forwards(groups: Iterable[Group]) -> int:
    """Number of tasks in an order; a fused item counts two."""
    return sum(len(item) for group in groups for item in group)


def rank_order(group: Group) -> list[BatchItem]:
    """The items of a group in the order in which a rank runs them one by one.

    The oldest block comes first, since later blocks depend on it; within a block denoise tasks come first, since other
    ranks wait for their latents.
    """
    return sorted(group, key=lambda item: (item[-1].block, item[-1].kind != "denoise"))


def _caches_used(plan: Plan, task: Task) -> set[int]:
    """The caches that a task reads or writes."""
    shares_kv = plan.kv_source == "next_step" and task.kind == "denoise" and task.step > 0
    return {plan.cache_index(s) for s in ((task.step - 1, task.step) if shares_kv else (task.step,))}


def _check_item(item: BatchItem) -> None:
    if len(item) == 1:
        return
    if not item or item != (cache(item[-1].step, item[-1].block - 1), denoise(item[-1].step, item[-1].block)):
        tasks = ", ".join(map(str, item))
        raise ValueError(f"({tasks}) is no batch item: give one task, or cache(s, n - 1) and denoise(s, n)")


def _check_task(plan: Plan, task: Task, num_blocks: int) -> None:
    """ValueError for a task that is not part of this video."""
    if task.kind not in ("denoise", "cache"):
        raise ValueError(f"{task}: kind must be denoise or cache, got {task.kind!r}")
    if not 0 <= task.step < plan.steps:
        raise ValueError(f"{task}: step must be 0 to {plan.steps - 1}, got {task.step}")
    if not 0 <= task.block < num_blocks:
        raise ValueError(f"{task}: block must be 0 to {num_blocks - 1}, got {task.block}")
    if task.kind == "denoise" and task.block < plan.prefix_blocks:
        raise ValueError(f"{task}: denoised blocks start at {plan.prefix_blocks}, after the prefix; got {task.block}")
