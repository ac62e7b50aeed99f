"""Executes groups of tasks on tensors. Which tasks, and in which order, is the plan's business."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hiar_kernels import BlockCausal, takes_layout
from hiar_kernels.nvtx import span

from ..common.cuda_graph import CudaGraphs
from ..config import TRAIN_TIMESTEPS, ExecutionConfig, RolloutConfig
from ..models.cached_attention import CachedAttention
from ..models.conditions import CrossAttentionKV
from ..models.kv_cache import RingCache
from ..models.transformer import HiARTransformer
from ..schedule.plan import BatchItem, Group, Plan, Task
from .batched_forward import BatchedForward, Capture, GraphKey, pinned
from .fixed_frames import FixedFrames
from .nan_guard import NaNGuard
from .noise import INITIAL
from .prompt_cache import PromptBuffers, PromptCache, PromptSource
from .recache import History, empty

if TYPE_CHECKING:
    from ..distributed.pipeline import Pipeline

NoiseSource = Callable[[int, int], Tensor]  # (step, block) -> [B, frames, C, H, W]; step -1: initial noise
Finished = list[tuple[int, Tensor]]  # blocks, with their latents [B, F, C, H, W]
Ready = tuple[list[BatchItem], BatchedForward]  # batch items, and their forward with its inputs filled


def working_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of attention: that of autocast where it is on, else that of the weights."""
    device = weight.device.type
    if weight.is_meta or not torch.is_autocast_enabled(device):  # which meta tensors cannot be asked for
        return weight.dtype
    return torch.get_autocast_dtype(device)


@dataclass
class Counters:
    """Executed so far: denoise and cache tasks, batched forwards (``launches``), and how many of those were captured
    as graphs.
    """

    denoise: int = 0
    cache: int = 0
    launches: int = 0
    captures: int = 0


class Executor:
    """Runs groups of tasks; owns the latents in flight and the KV caches.

    Args:
        models: one for each step (the same one repeated, or experts). plan: the tasks. num_blocks: None: endless.
        config, execution: of the rollout. cache: one ring for each KV cache of the plan. grid: (rows, columns) of
            tokens of a frame.
        sources: prompt embeddings of a block [B or 1, L, text_dim]; initial noise; noise of the steps; clean prefix
            [B, F, C, H, W] or None. fixed: frames inside generated blocks that are given.
        attend: makes the self-attention of a forward; takes the arguments of :class:`CachedAttention`.
        pipeline: this rank's stage; the caches are then those of its own steps.
    """

    def __init__(
        self,
        models: Sequence[HiARTransformer],
        plan: Plan,
        num_blocks: int | None,
        config: RolloutConfig,
        execution: ExecutionConfig,
        cache: RingCache,
        grid: tuple[int, int],
        sources: tuple[PromptSource, NoiseSource, NoiseSource, Tensor | None],
        fixed: FixedFrames,
        attend: Callable[..., CachedAttention] = CachedAttention,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.models, self.plan, self.num_blocks, self.cache, self.grid = models, plan, num_blocks, cache, grid
        self.prompt_embeds, self.noise, self.renoise, self.prefix = sources
        self.fixed = fixed
        self.first_frame, self.sampler, schedule = config.first_frame, config.sampler, config.schedule
        self.pipeline, self.history = pipeline, History(plan) if config.on_prompt_change == "recache" else None
        self.steps = range(plan.steps) if pipeline is None else pipeline.stage.steps
        weight = models[0].patch_embedding.weight
        self.device, self.dtype, self.attend = weight.device, weight.dtype, attend
        self.sigmas = schedule.sigmas
        self.sigma_dtype = torch.promote_types(self.dtype, torch.float32)
        # the modulation table has one entry for each noise level, and a last one for clean frames that are given
        levels = [TRAIN_TIMESTEPS * s for s in schedule.sigmas[:-1]] + [config.context_noise, 0.0]
        self.clean = len(levels) - 1
        self.timesteps = torch.tensor([levels], dtype=torch.float64, device=self.device)
        self.tables = {id(m): m.modulation_table(self.timesteps) for m in models}
        self.prompt_cache, self.prompt_buffers = PromptCache(limit=2 * len(models) + 2), PromptBuffers()
        self.latents: dict[tuple[int, int], Tensor] = {}  # (level, block) -> x
        self.readers: dict[tuple[int, int], int] = {}  # tasks that still need it
        self.free_buffers: dict[tuple[int, ...], list[Tensor]] = {}  # of latents, by shape
        self.drawn: dict[tuple[int, int], Tensor] = {}  # noise drawn ahead, by (step, block)
        me = weakref.proxy(self)  # no reference cycle: a dropped rollout frees its caches at once
        self.nan_guard = NaNGuard(execution.on_nan, lambda *args: me._filled(*args), self.device, self.steps.stop - 1)
        self.batched_forwards: dict[GraphKey, BatchedForward] = {}
        self.capture: Capture | None = None
        if execution.cuda_graph:
            self.capture = CudaGraphs(self.device)
        q = weight.new_empty(1, 1, *cache.k[0].shape[3:], dtype=working_dtype(weight))
        # a library needs the visible keys of every block on the host; other kernels read frame ids on the device
        self.attention_impl = execution.attention_impl
        self.by_layout = not cache.k_scales and takes_layout(q, self._mask([0]), execution.attention_impl)
        self.float8_products = execution.attention_dtype is not None
        self.counters = Counters()
        self.on_denoise: Callable[[Task, Tensor], None] | None = None  # called with each denoise task and its input
        self.on_denoised: Callable[[Task, Tensor], None] | None = None  # ... and what it gave
        self.step = 0
        self.last_started_block = -1
        sigmas = ", ".join(f"{level:g}" for level in schedule.sigmas)
        policy = "" if self.history is None else ", recache"
        numbers = f", conditioning frames {', '.join(map(str, fixed.numbers))}" if fixed.numbers else ""
        # what a saved state depends on, beside the plan
        context = f"context at {config.context_noise:g}{policy}{numbers}"
        self.about = f"{self.dtype}, noise levels {sigmas}, {self.sampler}, {context}"

    def run(self, group: Group) -> Finished:
        """Execute one group; returns the blocks that it finished.

        On an accelerator the work is only queued, nothing here reads the device: call :meth:`await_finished` before a
        block is handed over.
        """
        forwards = self.forwards(group)
        try:
            while True:
                self.run_forward(*next(forwards))
        except StopIteration as end:
            return end.value

    @torch.no_grad()
    def run_forward(self, items: list[BatchItem], forward: BatchedForward) -> None:
        """Run one of :meth:`forwards`, by itself."""
        self.counters.captures += forward.captured is None and self.capture is not None
        blocks = {item[-1].block: None for item in items}
        with span("block", *blocks), span("task", *(task for item in items for task in item)):
            forward.run(self.capture)

    @torch.no_grad()
    def forwards(self, group: Group) -> Generator[Ready, None, Finished]:
        """The forwards of one group, one after the other: each must have run when the next is asked for. Returns what
        :meth:`run` does.
        """
        if self.plan.order == "step_first" and group[0][-1].step != self.step:
            self.step = group[0][-1].step
            self.cache.reset()  # one ring serves all steps, one after another
        if self.history is not None:
            for item in group:
                yield from self._recache(item[-1])
        inputs = [[self._input(task) for task in item] for item in group]
        if self.on_denoise is not None:
            for item, latents in zip(group, inputs, strict=True):
                if item[-1].kind == "denoise":
                    self.on_denoise(item[-1], latents[-1])
        finished = []
        for indices in self._batches(group):
            denoised = yield from self._forward([group[i] for i in indices], [inputs[i] for i in indices])
            for task, out in denoised:
                x = self._copy(out)
                if self.on_denoised is not None:
                    self.on_denoised(task, x)
                self.fixed.put(task.block, x)
                if self.history is not None:
                    self.history.store(task, x)
                self._put(task.step + 1, task.block, x)
                if task.step + 1 == self.steps.stop and self.pipeline is not None and self.pipeline.stage.sends:
                    self.nan_guard.read()  # another rank must not receive NaN
                    self.pipeline.send(task.block, x)
                elif task.step + 1 == self.plan.steps:
                    finished.append((task.block, x.clone()))
        for item in group:
            for task in item:
                self._release(task)
        return finished

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Compute anew what depends on the weights alone, in the memory that captured graphs read."""
        for model in {id(model): model for model in self.models}.values():
            self.tables[id(model)].vectors.copy_(model.modulation_table(self.timesteps).vectors)
        self.prompt_cache.entries.clear()
        self.prompt_cache.stacked.clear()

    def may_run_ahead(self, following: Group) -> bool:
        """Whether these tasks may be queued before the finished blocks are waited for and handed over.

        Cache tasks only: they belong to blocks that have started, so no prompt that arrives meanwhile is missed. On a
        CPU nothing is queued, and the block would only come later.
        """
        only_cache = self.pipeline is None and all(task.kind == "cache" for item in following for task in item)
        return only_cache and self.device.type != "cpu" and self.nan_guard.mode != "retry"

    def await_finished(self, following: Group | None) -> None:
        """Wait until the finished blocks are known to be finite.

        Draws the noise of the ``following`` tasks first, on the host, while the device works: drawn after the wait, the
        device would be idle meanwhile.

        Raises:
            FloatingPointError: names the first task that failed, and where in it.
        """
        for task in (item[-1] for item in following or () if item[-1].kind == "denoise"):
            if task.step == 0 and (0, task.block) not in self.latents:
                self.drawn[INITIAL, task.block] = self._draw(INITIAL, task.block)
            if self._takes_noise(task):
                self.drawn[task.step, task.block] = self._draw(task.step, task.block)
        self.nan_guard.read()
        self._reclaim()

    @torch.no_grad()
    def warm_up(self, blocks: int) -> int:
        """Run each kind of forward in the video once, on zeros, so that everything is compiled, loaded and captured.
        Before the first task only.

        Args:
            blocks: of an endless video, how many to look through.

        Returns:
            How many kinds there are.
        """
        assert not self.latents and not self.counters.launches, "warm_up must come before the first task"
        seen: set[GraphKey] = set()
        for forward in self.prepared(blocks):
            if forward.key not in seen:
                seen.add(forward.key)
                forward.run(self.capture)
                self.counters.captures += self.capture is not None
        self.cache.reset()
        return len(seen)

    def prepared(self, blocks: int) -> Iterator[BatchedForward]:
        """The forwards of the video in order (endless: of its first ``blocks``), prepared to run, inputs not filled."""
        groups = self.plan.groups if self.pipeline is None else self.pipeline.stage.groups
        for group in groups(self.num_blocks or blocks + self.plan.prefix_blocks):
            for indices in self._batches(group):
                items = [group[i] for i in indices]
                yield self._prepared(items, self._prompt_kv(self.models[items[0][-1].step], items))

    # Latents in flight.

    def _input(self, task: Task) -> Tensor:
        if task.kind == "cache" and task.block < self.plan.prefix_blocks:
            assert self.prefix is not None
            start, stop = self.plan.block_frames(task.block)
            return self.prefix[:, start:stop].to(self.device, self.dtype)
        level = task.step if task.kind == "denoise" else task.step + 1
        if level == self.steps.start and (level, task.block) not in self.latents:
            self.last_started_block = max(self.last_started_block, task.block)
            self._put(level, task.block, self.fixed.put(task.block, self._copy(self._arriving(level, task.block))))
        return self.latents[level, task.block]

    def _arriving(self, level: int, block: int) -> Tensor:
        if level == 0:
            return self._noise(INITIAL, block)
        assert self.pipeline is not None
        return self.pipeline.receive(block)

    def _put(self, level: int, block: int, latents: Tensor) -> None:
        readers = int(level in self.steps)
        readers += level - 1 in self.steps and self.plan.has_cache(level - 1, block, self.num_blocks)
        if readers:
            self.latents[level, block], self.readers[level, block] = latents, readers
        else:
            self._free(latents)

    def _release(self, task: Task) -> None:
        key = (task.step if task.kind == "denoise" else task.step + 1, task.block)
        if key in self.readers:
            self.readers[key] -= 1
            if not self.readers[key]:
                del self.readers[key]
                self._free(self.latents.pop(key))

    def _copy(self, latents: Tensor) -> Tensor:
        """A copy on the device, in a free buffer if there is one: nothing is allocated per task."""
        free = self.free_buffers.get(tuple(latents.shape))
        buffer = free.pop() if free else torch.empty(latents.shape, dtype=self.dtype, device=self.device)
        return buffer.copy_(pinned(latents, self.device), non_blocking=True)

    def _free(self, latents: Tensor) -> None:
        self.nan_guard.quarantined.append(latents)
        self._reclaim()

    def _reclaim(self) -> None:
        for x in self.nan_guard.release():
            self.free_buffers.setdefault(tuple(x.shape), []).append(x)

    # One batched forward.

    def _batches(self, group: Group) -> list[list[int]]:
        """Indices of the batch items that form one batch: one network, equal frame counts, evenly spaced caches (so
        that their rings are a strided view).
        """
        batches: list[list[int]] = []
        for i, item in enumerate(group):
            if batches and self._joins([group[j] for j in batches[-1]], item):
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _joins(self, items: list[BatchItem], item: BatchItem) -> bool:
        last, step = items[-1], item[-1].step
        if self.models[last[-1].step] is not self.models[step] or self._frames(last) != self._frames(item):
            return False
        stride = step - last[-1].step
        if self.plan.caches == 1 or (stride != 1 and self.cache.batch > 1):
            return False
        return len(items) == 1 or stride == last[-1].step - items[-2][-1].step

    def _frames(self, item: BatchItem) -> int:
        return sum(stop - start for start, stop in (self.plan.block_frames(task.block) for task in item))

    def _forward(
        self, items: list[BatchItem], inputs: list[list[Tensor]], prompt_embeds: Tensor | None = None
    ) -> Generator[Ready, None, list[tuple[Task, Tensor]]]:
        """Batch items as one forward; returns the result of each denoise task, valid until the next forward.

        ``prompt_embeds``: in place of those of the blocks.
        """
        tasks = [item[-1] for item in items if item[-1].kind == "denoise"]
        forward = self._filled(items, inputs, prompt_embeds)
        yield items, forward
        self.counters.launches += 1
        self.counters.denoise += len(tasks)
        self.counters.cache += sum(map(len, items)) - len(tasks)
        forward = self.nan_guard.check(items, inputs, forward, prompt_embeds)
        return list(zip(tasks, forward.out.chunk(len(tasks)), strict=True)) if tasks else []

    def _filled(
        self, items: list[BatchItem], inputs: list[list[Tensor]], prompt_embeds: Tensor | None = None
    ) -> BatchedForward:
        """The forward of batch items with its buffers filled and the caches positioned at their first frames."""
        model = self.models[items[0][-1].step]
        kv = self._prompt_kv(model, items) if prompt_embeds is None else self.prompt_cache.get(model, [prompt_embeds])
        forward = self._prepared(items, kv)
        levels = [[level for task in item for level in self._levels(task)] for item in items]
        tasks = [item[-1] for item in items if item[-1].kind == "denoise"]
        sigmas = [(self.sigmas[task.step], self.sigmas[task.step + 1]) for task in tasks]
        noise = [self._noise(task.step, task.block) if self._takes_noise(task) else None for task in tasks]
        forward.fill(inputs, levels, sigmas, noise)
        return forward

    def _recache(self, task: Task) -> Generator[Ready, None, None]:
        """Before a denoise task at which the prompt changes: cache the blocks it sees under the new prompt."""
        assert self.history is not None
        block = task.block
        if task.kind == "cache" or not block or self.prompt_embeds(block) is self.prompt_embeds(block - 1):
            return
        cache_tasks = self.history.tasks(task)
        if cache_tasks:
            empty(self.cache, self.plan.cache_index(cache_tasks[0].step) - self.plan.cache_index(self.steps.start))
        for cache_task in cache_tasks:
            x = self.history.latents(cache_task)
            inputs = [[self._input(cache_task) if x is None else x]]
            yield from self._forward([(cache_task,)], inputs, self.prompt_embeds(block))

    def _prepared(self, items: list[BatchItem], prompt_kv: CrossAttentionKV) -> BatchedForward:
        """The forward of batch items with caches and prompt in place."""
        model = self.models[items[0][-1].step]
        first = self.plan.cache_index(self.steps.start)
        index = [self.plan.cache_index(item[-1].step) - first for item in items]
        shared = self.plan.kv_source == "next_step"
        if self.capture is not None:
            prompt_kv = self.prompt_buffers.put(model, prompt_kv)
        key = GraphKey(
            id(model),
            (index[0], index[-1], index[1] - index[0] if len(index) > 1 else 1),
            tuple(tuple((t.kind, len(range(*self.plan.block_frames(t.block)))) for t in item) for item in items),
            tuple(self.plan.window_frames[item[-1].step] for item in items),
            tuple(shared and item[-1].kind == "denoise" and item[-1].step > 0 for item in items),
            prompt_kv.shape,
        )
        forward = self._forward_of(key, model, prompt_kv)
        forward.prompt_kv = prompt_kv
        starts = [self.plan.block_frames(item[0].block)[0] for item in items]
        layout = forward.attend.prepare_host(starts, layout=self.by_layout)
        if layout is not None and self.capture is not None:
            forward = self._forward_of(replace(key, layout=layout), model, prompt_kv)
        forward.attend.layout = layout
        return forward

    def _forward_of(self, key: GraphKey, model: HiARTransformer, prompt_kv: CrossAttentionKV) -> BatchedForward:
        if key not in self.batched_forwards:
            self.batched_forwards[key] = self._new_forward(key, model, prompt_kv)
        return self.batched_forwards[key]

    def _new_forward(self, key: GraphKey, model: HiARTransformer, prompt_kv: CrossAttentionKV) -> BatchedForward:
        cache, (first, last, stride) = self.cache, key.caches
        frames = sum(count for _, count in key.items[0])
        done = [sum(count for kind, count in item if kind == "cache") for item in key.items]
        mask = self._mask([window for window in key.windows for _ in range(cache.batch)])
        attend = self.attend(
            cache, slice(first, last + 1, stride), frames, done, self.grid, self.first_frame, mask, key.shares_kv,
            self.attention_impl, self.float8_products,
        )  # fmt: skip
        height, width = (n * p for n, p in zip(self.grid, model.config.patch_size[1:], strict=True))
        shape = (model.config.in_channels, height, width)
        return BatchedForward(
            key, model, self.tables[id(model)], attend, prompt_kv, shape, cache.batch, self.sigma_dtype,
            self.sampler == "sde",
        )  # fmt: skip

    def _mask(self, windows: Sequence[int | None]) -> BlockCausal:
        window = tuple(windows) if any(windows) else None
        return BlockCausal(self.cache.frame_tokens, **self.plan.block_causal(window), first_frame=self.first_frame)

    def _levels(self, task: Task) -> list[int]:
        """Indices into the modulation table: the noise level of each frame, which conditions the network."""
        level, fixed = task.step if task.kind == "denoise" else task.step + 1, self.fixed.inside(task.block)
        clean = task.block < self.plan.prefix_blocks
        frames = range(len(range(*self.plan.block_frames(task.block))))
        return [self.clean if clean or frame in fixed else level for frame in frames]

    def _prompt_kv(self, model: HiARTransformer, items: list[BatchItem]) -> CrossAttentionKV:
        prompts = [self.prompt_embeds(item[-1].block) for item in items]
        of_items = zip(items, prompts, strict=True)
        if any(len(item) == 2 and self.prompt_embeds(item[0].block) is not prompt for item, prompt in of_items):
            raise ValueError(
                "fuse_cache_denoise=True needs one prompt for all blocks: fused tasks share their cross-attention"
            )
        return self.prompt_cache.get(model, prompts, self.cache.batch)

    def _takes_noise(self, task: Task) -> bool:
        return self.sampler == "sde" and task.step + 1 < self.plan.steps

    def _noise(self, step: int, block: int) -> Tensor:
        drawn = self.drawn.pop((step, block), None)
        return self._draw(step, block) if drawn is None else drawn

    def _draw(self, step: int, block: int) -> Tensor:
        drawn = self.noise(step, block) if step == INITIAL else self.renoise(step, block).to(self.dtype)
        return pinned(drawn, self.device)

    # State.

    def state_dict(self, device: torch.device | None = None) -> dict[str, Any]:
        """Copies of the caches, the latents in flight and those stored for recaching, the position inside step_first,
        and the prompts of the blocks in flight; the caches on their own device, or another.
        """
        latents = {f"{level}/{block}": x.clone() for (level, block), x in self.latents.items()}
        last = self.last_started_block
        first = 0 if self.plan.order == "step_first" else min((n for _, n in self.latents), default=last) - 1
        return {
            "cache": self.cache.state_dict(device),
            "latents": latents,
            "history": {} if self.history is None else self.history.state_dict(),
            "step": self.step,
            "prompt_embeds": {block: self.prompt_embeds(block) for block in range(max(0, first), last + 1)},
        }

    def load_state_dict(self, state: dict[str, Any], executed: set[Task]) -> None:
        """Restore a saved state, after the ``executed`` tasks.

        Raises:
            ValueError: latents in flight or tensors of the caches are missing, or of another shape or dtype.
        """
        in_flight = {f"{level}/{block}" for level, block in self._in_flight(executed)}
        if differing := in_flight ^ set(state["latents"]):
            what = "missing" if differing & in_flight else "unexpected"
            raise ValueError(f"damaged: latents {', '.join(sorted(differing)[:3])} are {what}")
        self.cache.load_state_dict(state["cache"])
        self.latents, self.readers, self.drawn, self.step = {}, {}, {}, state["step"]
        self.last_started_block = max(state["prompt_embeds"], default=-1)
        if self.history is not None:
            self.history.load_state_dict(state["history"], self.models[0].patch_embedding.weight)
        for name, x in state["latents"].items():
            level, block = map(int, name.split("/"))
            self._put(level, block, self._copy(x))
            for task in (Task("denoise", level, block), Task("cache", level - 1, block)):
                if task.step in range(self.plan.steps) and task in executed:
                    self._release(task)

    def _in_flight(self, executed: set[Task]) -> Iterator[tuple[int, int]]:
        """Level and block of the latents that tasks made which others still need."""
        for task in executed:
            level, block = task.step + 1, task.block
            readers = [Task("denoise", level, block)] * (level in self.steps)
            readers += [Task("cache", task.step, block)] * self.plan.has_cache(task.step, block, self.num_blocks)
            if task.kind == "denoise" and not executed.issuperset(readers):
                yield level, block
