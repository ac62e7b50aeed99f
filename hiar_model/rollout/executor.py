"""The one loop: executes groups of tasks on tensors. What is visited, and when, is the plan's business."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hiar_kernels import BlockCausal, takes_layout
from hiar_kernels.nvtx import span

from ..config import TRAIN_TIMESTEPS, ExecutionConfig, RolloutConfig
from ..models.conditions import CrossAttentionKV
from ..models.kv_cache import CachedAttention, RingCache
from ..models.transformer import HiARTransformer
from ..schedule.plan import Group, Plan, Row, Task
from .batched_forward import BatchedForward, Capture, GraphKey, on_the_way
from .cuda_graph import CudaGraphs
from .nan_guard import NaNGuard
from .noise import INITIAL
from .prompt_cache import PromptBuffers, PromptCache, TextSource
from .recache import History, forget

if TYPE_CHECKING:
    from ..distributed.pipeline import Pipeline

NoiseSource = Callable[[int, int], Tensor]  # (step, block) -> [B, frames, C, H, W]; step -1: initial noise


def working_dtype(weight: Tensor) -> torch.dtype:
    """What attention works in: the dtype of the weights, or that of autocast where it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@dataclass
class Counters:
    """What a rollout has executed so far: forwards of the network by kind, batched launches, and those of them that
    were captured.
    """

    denoise: int = 0
    cache: int = 0
    launches: int = 0
    captures: int = 0


class Executor:
    """Runs groups of tasks and keeps what is between them: latents in flight and the rings.

    Args:
        models: one for each step (the same one repeated, or experts). plan: of the tasks; ``num_blocks`` of the order.
        config, execution: of the rollout. cache: the rings of the plan's caches. grid: (rows, columns) of tokens.
        sources: prompt embedding of a block [B or 1, L, text_dim]; initial noise; noise of the steps; clean prefix
            [B, F, C, H, W] or None.
        attend: makes the self-attention of a kind of forward; takes the arguments of :class:`CachedAttention`.
        pipeline: this rank's place in one; then the caches are those of its own steps.
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
        sources: tuple[TextSource, NoiseSource, NoiseSource, Tensor | None],
        attend: Callable[..., CachedAttention] = CachedAttention,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.models, self.plan, self.num_blocks, self.cache, self.grid = models, plan, num_blocks, cache, grid
        self.text, self.noise, self.renoise, self.prefix = sources
        self.first_frame, self.sampler, schedule = config.first_frame, config.sampler, config.schedule
        self.pipeline, self.history = pipeline, History(plan) if config.on_prompt_change == "recache" else None
        self.steps = range(plan.steps) if pipeline is None else pipeline.stage.steps
        weight = models[0].patch_embedding.weight
        self.device, self.dtype, self.attend = weight.device, weight.dtype, attend
        self.sigmas = schedule.sigmas
        self.wide = torch.promote_types(self.dtype, torch.float32)
        # one row for each noise level, and a last one for the clean prefix
        levels = [TRAIN_TIMESTEPS * s for s in schedule.sigmas[:-1]] + [config.context_noise, 0.0]
        self.clean = len(levels) - 1
        timesteps = torch.tensor([levels], dtype=torch.float64, device=self.device)
        self.tables = {id(m): m.modulation_table(timesteps) for m in models}
        self.texts, self.text_slots = PromptCache(limit=2 * len(models) + 2), PromptBuffers()
        self.latents: dict[tuple[int, int], Tensor] = {}  # (level, block) -> x
        self.readers: dict[tuple[int, int], int] = {}  # tasks that still need it
        self.spare: dict[tuple[int, ...], list[Tensor]] = {}  # memory of latents that nobody needs any more, by shape
        self.drawn: dict[tuple[int, int], Tensor] = {}  # noise that was made ahead, by (step, block)
        me = weakref.proxy(self)  # no cycle: a rollout that is dropped gives its rings back at once
        self.nan_guard = NaNGuard(execution.on_nan, lambda *task: me._ready(*task), self.device, self.steps.stop - 1)
        self.launches: dict[GraphKey, BatchedForward] = {}
        self.capture: Capture | None = None
        if execution.cuda_graph:
            self.capture = CudaGraphs(self.device)
        q = weight.new_empty(1, 1, *cache.k[0].shape[3:], dtype=working_dtype(weight))
        # frame ids on the device serve every block; a library has to be told what is visible, block by block
        self.by_layout = takes_layout(q, self._mask([0]))
        self.counters = Counters()
        self.on_denoise: Callable[[Task, Tensor], None] | None = None  # told each denoise task and its input
        self.step = 0
        self.begun = -1  # the last block of which anything was done
        sigmas = ", ".join(f"{level:g}" for level in schedule.sigmas)
        kept = "" if self.history is None else ", recache"
        # beside the plan, what a state depends on
        self.about = f"{self.dtype}, noise levels {sigmas}, {self.sampler}, context at {config.context_noise:g}{kept}"

    @torch.no_grad()
    def run(self, group: Group) -> list[tuple[int, Tensor]]:
        """Execute one group; returns the blocks that it finished, (block, latents [B, F, C, H, W]).

        On an accelerator the work is only queued, nothing here reads the device: :meth:`await_finished` before a block
        is handed over.
        """
        if self.plan.order == "step_first" and group[0][-1].step != self.step:
            self.step = group[0][-1].step
            self.cache.reset()  # one ring serves all steps, one after another
        if self.history is not None:
            for row in group:
                self._cache_again(row[-1])
        inputs = [[self._input(task) for task in row] for row in group]
        if self.on_denoise is not None:
            for row, taken in zip(group, inputs, strict=True):
                if row[-1].kind == "denoise":
                    self.on_denoise(row[-1], taken[-1])
        finished = []
        for run in self._launches(group):
            rows = [group[i] for i in run]
            with span("block", *{row[-1].block: None for row in rows}):
                denoised = self._launch(rows, [inputs[i] for i in run])
            for task, latents in denoised:
                kept = self._keep(latents)
                if self.history is not None:
                    self.history.note(task, kept)
                self._put(task.step + 1, task.block, kept)
                if task.step + 1 == self.steps.stop and self.pipeline is not None and self.pipeline.stage.sends:
                    self.nan_guard.look()  # before another rank takes them for sound
                    self.pipeline.send(task.block, kept)
                elif task.step + 1 == self.plan.steps:
                    finished.append((task.block, kept.clone()))
        for row in group:
            for task in row:
                self._release(task)
        return finished

    def may_run_ahead(self, following: Group) -> bool:
        """Whether these tasks may be queued before the blocks that were finished are waited for and handed over.

        Cache tasks alone: they belong to blocks that have begun, so no prompt that comes meanwhile is missed. On a CPU
        nothing is queued: the block would only come later.
        """
        alone = self.pipeline is None and all(task.kind == "cache" for row in following for task in row)
        return alone and self.device.type != "cpu" and self.nan_guard.mode != "retry"

    def await_finished(self, following: Group | None) -> None:
        """Wait until the blocks that were finished are known to be finite.

        Before that, while the device works, the host draws the noise of the ``following`` tasks: drawn after the wait
        it is time in which the device has nothing to do.

        Raises:
            FloatingPointError: names the first task that went wrong, and where in it.
        """
        for task in (row[-1] for row in following or () if row[-1].kind == "denoise"):
            if task.step == 0 and (0, task.block) not in self.latents:
                self.drawn[INITIAL, task.block] = self._draw(INITIAL, task.block)
            if self._takes_noise(task):
                self.drawn[task.step, task.block] = self._draw(task.step, task.block)
        self.nan_guard.look()
        self._reuse()

    @torch.no_grad()
    def warm_up(self, blocks: int) -> int:
        """Run each kind of launch in the walk of the video once, on zeros: everything that can be compiled, loaded or
        captured then is. Before the first task only. ``blocks``: to walk of an endless video.

        Returns:
            How many kinds there are.
        """
        assert not self.latents and not self.counters.launches, "the rollout has begun"
        seen: set[GraphKey] = set()
        for launch in self.prepared(blocks):
            if launch.kind not in seen:
                seen.add(launch.kind)
                launch.run(self.capture)
                self.counters.captures += self.capture is not None
        self.cache.reset()
        return len(seen)

    def prepared(self, blocks: int) -> Iterator[BatchedForward]:
        """The launches of the walk (of an endless video: its first ``blocks``), set up, not filled: to run here."""
        walk = self.plan.groups if self.pipeline is None else self.pipeline.stage.groups
        for group in walk(self.num_blocks or blocks + self.plan.prefix_blocks):
            for run in self._launches(group):
                rows = [group[i] for i in run]
                yield self._prepared(rows, self._text(self.models[rows[0][-1].step], rows))

    # Latents in flight.

    def _input(self, task: Task) -> Tensor:
        if task.kind == "cache" and task.block < self.plan.prefix_blocks:
            assert self.prefix is not None
            start, stop = self.plan.block_frames(task.block)
            return self.prefix[:, start:stop].to(self.device, self.dtype)
        level = task.step if task.kind == "denoise" else task.step + 1
        if level == self.steps.start and (level, task.block) not in self.latents:
            self.begun = max(self.begun, task.block)
            self._put(level, task.block, self._keep(self._arriving(level, task.block)))
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
            self._spare(latents)

    def _release(self, task: Task) -> None:
        key = (task.step if task.kind == "denoise" else task.step + 1, task.block)
        if key in self.readers:
            self.readers[key] -= 1
            if not self.readers[key]:
                del self.readers[key]
                self._spare(self.latents.pop(key))

    def _keep(self, latents: Tensor) -> Tensor:
        """A copy on the device, in memory that was used before where there is some: nothing is allocated per task."""
        spare = self.spare.get(tuple(latents.shape))
        place = spare.pop() if spare else torch.empty(latents.shape, dtype=self.dtype, device=self.device)
        return place.copy_(on_the_way(latents, self.device), non_blocking=True)

    def _spare(self, latents: Tensor) -> None:
        self.nan_guard.quarantined.append(latents)
        self._reuse()

    def _reuse(self) -> None:
        for x in self.nan_guard.release():
            self.spare.setdefault(tuple(x.shape), []).append(x)

    # One batched forward.

    def _launches(self, group: Group) -> list[list[int]]:
        """Rows that may be one batch: one model, as many frames, evenly spaced caches (so that rings are a view)."""
        runs: list[list[int]] = []
        for i, row in enumerate(group):
            if runs and self._joins([group[j] for j in runs[-1]], row):
                runs[-1].append(i)
            else:
                runs.append([i])
        return runs

    def _joins(self, rows: list[Row], row: Row) -> bool:
        last = rows[-1]
        if self.models[last[-1].step] is not self.models[row[-1].step] or self._frame_count(last) != self._frame_count(
            row
        ):
            return False
        stride = row[-1].step - last[-1].step
        if self.plan.caches == 1 or (stride != 1 and self.cache.batch > 1):
            return False
        return len(rows) == 1 or stride == last[-1].step - rows[-2][-1].step

    def _frame_count(self, row: Row) -> int:
        return sum(stop - start for start, stop in (self.plan.block_frames(v.block) for v in row))

    def _launch(
        self, rows: list[Row], inputs: list[list[Tensor]], text: Tensor | None = None
    ) -> list[tuple[Task, Tensor]]:
        """Run rows as one batch; returns the denoised latents of each denoise task, valid until the next launch.

        ``text``: in place of that of the blocks.
        """
        tasks = [row[-1] for row in rows if row[-1].kind == "denoise"]
        launch = self._ready(rows, inputs, text)
        captured = launch.captured is None and self.capture is not None
        with span("task", *(task for row in rows for task in row)):
            launch.run(self.capture)
        self.counters.captures += captured
        self.counters.launches += 1
        self.counters.denoise += len(tasks)
        self.counters.cache += sum(len(row) for row in rows) - len(tasks)
        launch = self.nan_guard.watch(rows, inputs, launch, text)
        return list(zip(tasks, launch.out.chunk(len(tasks)), strict=True)) if tasks else []

    def _ready(self, rows: list[Row], inputs: list[list[Tensor]], text: Tensor | None = None) -> BatchedForward:
        """The launch of such rows, filled with what they need; rings stand where the rows begin."""
        model = self.models[rows[0][-1].step]
        launch = self._prepared(rows, self._text(model, rows) if text is None else self.texts.get(model, [text]))
        levels = [[self._level(v) for v in row for _ in range(*self.plan.block_frames(v.block))] for row in rows]
        tasks = [row[-1] for row in rows if row[-1].kind == "denoise"]
        steps = [(self.sigmas[v.step], self.sigmas[v.step + 1]) for v in tasks]
        launch.fill(inputs, levels, steps, [self._renoise(v) for v in tasks])
        return launch

    def _cache_again(self, task: Task) -> None:
        """Before a denoise task at which the text changes: the blocks it sees are cached under the new text."""
        assert self.history is not None
        block = task.block
        if task.kind == "cache" or not block or self.text(block) is self.text(block - 1):
            return
        again = self.history.tasks(task)
        if again:
            forget(self.cache, self.plan.cache_index(again[0].step) - self.plan.cache_index(self.steps.start))
        for one in again:
            x = self.history.latents(one)
            self._launch([(one,)], [[self._input(one) if x is None else x]], self.text(block))

    def _prepared(self, rows: list[Row], text: CrossAttentionKV) -> BatchedForward:
        """The launch of such rows, with rings and text in place for them."""
        model = self.models[rows[0][-1].step]
        first = self.plan.cache_index(self.steps.start)
        index = [self.plan.cache_index(row[-1].step) - first for row in rows]
        lent = self.plan.kv_source == "next_step"
        if self.capture is not None:
            text = self.text_slots.put(model, text)
        kind = GraphKey(
            id(model),
            (index[0], index[-1], index[1] - index[0] if len(index) > 1 else 1),
            tuple(tuple((v.kind, len(range(*self.plan.block_frames(v.block)))) for v in row) for row in rows),
            tuple(self.plan.window_frames[row[-1].step] for row in rows),
            tuple(lent and row[-1].kind == "denoise" and row[-1].step > 0 for row in rows),
            text.shape,
        )
        launch = self.launches.get(kind)
        if launch is None:
            launch = self.launches[kind] = self._new_launch(kind, model, text)
        launch.text = text
        starts = [self.plan.block_frames(row[0].block)[0] for row in rows]
        layout = launch.attend.prepare_host(starts, layout=self.by_layout)
        if layout is not None and self.capture is not None:
            by_layout = replace(kind, layout=layout)
            if by_layout not in self.launches:
                self.launches[by_layout] = self._new_launch(by_layout, model, text)
            launch = self.launches[by_layout]
        launch.attend.layout = layout
        return launch

    def _new_launch(self, kind: GraphKey, model: HiARTransformer, text: CrossAttentionKV) -> BatchedForward:
        cache, (first, last, stride) = self.cache, kind.caches
        frames = sum(count for _, count in kind.rows[0])
        done = [sum(count for name, count in row if name == "cache") for row in kind.rows]
        mask = self._mask([window for window in kind.windows for _ in range(cache.batch)])
        attend = self.attend(
            cache, slice(first, last + 1, stride), frames, done, self.grid, self.first_frame, mask, kind.lends
        )
        height, width = (n * p for n, p in zip(self.grid, model.config.patch_size[1:], strict=True))
        shape = (model.config.in_channels, height, width)
        table = self.tables[id(model)]
        return BatchedForward(kind, model, table, attend, text, shape, cache.batch, self.wide, self.sampler == "sde")

    def _mask(self, windows: Sequence[int | None]) -> BlockCausal:
        plan = self.plan
        return BlockCausal(
            self.cache.frame_tokens,
            plan.frames_per_block,
            tuple(windows) if any(windows) else None,
            plan.sink_frames,
            self.first_frame,
            plan.first_block_frames,
        )

    def _level(self, task: Task) -> int:
        """Row of the modulation table: the noise level that the network is told."""
        if task.kind == "denoise":
            return task.step
        return self.clean if task.block < self.plan.prefix_blocks else task.step + 1

    def _text(self, model: HiARTransformer, rows: list[Row]) -> CrossAttentionKV:
        texts = [self.text(row[-1].block) for row in rows]
        if any(len(row) == 2 and self.text(row[0].block) is not text for row, text in zip(rows, texts, strict=True)):
            raise ValueError(
                "fuse_cache_denoise=True needs one prompt for all blocks: fused tasks share their cross-attention"
            )
        return self.texts.get(model, texts, self.cache.batch)

    def _renoise(self, task: Task) -> Tensor | None:
        """Noise of a step on its way to the device; None where it has no weight."""
        return self._noise(task.step, task.block) if self._takes_noise(task) else None

    def _takes_noise(self, task: Task) -> bool:
        return self.sampler == "sde" and task.step + 1 < self.plan.steps

    def _noise(self, step: int, block: int) -> Tensor:
        drawn = self.drawn.pop((step, block), None)
        return self._draw(step, block) if drawn is None else drawn

    def _draw(self, step: int, block: int) -> Tensor:
        drawn = self.noise(step, block) if step == INITIAL else self.renoise(step, block).to(self.dtype)
        return on_the_way(drawn, self.device)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Copies of the rings, the latents in flight and those kept to be cached again, the position inside step_first,
        and the texts that blocks in flight began with.
        """
        latents = {f"{level}/{block}": x.clone() for (level, block), x in self.latents.items()}
        first = 0 if self.plan.order == "step_first" else min((n for _, n in self.latents), default=self.begun) - 1
        return {
            "cache": self.cache.state_dict(),
            "latents": latents,
            "history": {} if self.history is None else self.history.state_dict(),
            "step": self.step,
            "texts": {block: self.text(block) for block in range(max(0, first), self.begun + 1)},
        }

    def load_state_dict(self, state: dict[str, Any], done: Callable[[Task], bool]) -> None:
        """Take over a saved state; ``done`` tells which tasks were executed before it."""
        self.cache.load_state_dict(state["cache"])
        self.latents, self.readers, self.drawn, self.step = {}, {}, {}, state["step"]
        self.begun = max(state["texts"], default=-1)
        if self.history is not None:
            self.history.load_state_dict(state["history"], self.models[0].patch_embedding.weight)
        for name, x in state["latents"].items():
            level, block = map(int, name.split("/"))
            self._put(level, block, self._keep(x))
            for task in (Task("denoise", level, block), Task("cache", level - 1, block)):
                if task.step in range(self.plan.steps) and done(task):
                    self._release(task)
