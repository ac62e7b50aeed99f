"""The one loop: executes groups of visits on tensors. What is visited, and when, is the plan's business."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hiar_kernels import BlockCausal, flow_step

from ..cache import RingAttend, RingCache
from ..schedule import TRAIN_TIMESTEPS, FlowSchedule
from ..transformer import HiARTransformer, Live, Modulation, TextKV
from .visits import Group, Plan, Row, Visit

TextSource = Callable[[int], Tensor]
NoiseSource = Callable[[int, int], Tensor]  # (step, block) -> [B, frames, C, H, W]; step -1: initial noise


@dataclass
class Counters:
    """What a rollout has executed so far: forwards of the network by kind, and batched launches."""

    denoise: int = 0
    cache: int = 0
    launches: int = 0


@dataclass
class _TextCache:
    """Keys and values of the prompts in use, for each model: computed once per weights and prompt."""

    limit: int
    entries: dict[tuple[int, int], tuple[Tensor, TextKV]] = field(default_factory=dict)
    stacked: dict[tuple[int, ...], TextKV] = field(default_factory=dict)

    def get(self, model: HiARTransformer, texts: Sequence[Tensor]) -> TextKV:
        """For one row a text: [rows * B, ...]; [1, ...] where all rows share one text of batch 1."""
        keys = [(id(model), id(text)) for text in texts]
        for key, text in zip(keys, texts, strict=True):
            if key not in self.entries:
                self.entries[key] = (text, model.text_kv(trim_padding(text)))
        parts = [self.entries[key][1] for key in keys]
        shared = len(set(keys)) == 1
        if shared and (len(parts) == 1 or texts[0].shape[0] == 1):
            found = parts[0]
        else:
            name = tuple(id(part) for part in parts)
            if name not in self.stacked:
                self.stacked[name] = _stack(parts)
            found = self.stacked[name]
        self._forget(set(keys))
        return found

    def _forget(self, used: set[tuple[int, int]]) -> None:
        while len(self.entries) > self.limit:
            oldest = next(key for key in self.entries if key not in used)
            del self.entries[oldest]
            self.stacked.clear()  # its keys are identities of what was just freed
        while len(self.stacked) > self.limit:
            del self.stacked[next(iter(self.stacked))]


def trim_padding(text: Tensor) -> Tensor:
    """Drop trailing zero tokens that every row of [B, L, D] has: padding, which the model counts instead."""
    used = text.abs().amax(dim=(0, 2)) > 0
    return text[:, : int(used.nonzero()[-1]) + 1] if bool(used.any()) else text[:, :0]


def _stack(parts: Sequence[TextKV]) -> TextKV:
    """Texts of different lengths as rows of one batch: the missing keys count 0 times."""
    length = max(part.counts.shape[1] for part in parts)

    def pad(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], 1)

    layers = []
    for layer in zip(*(part.layers for part in parts), strict=True):
        layers.append((torch.cat([pad(k) for k, _ in layer]), torch.cat([pad(v) for _, v in layer])))
    counts = [pad(part.counts).expand(part.layers[0][0].shape[0], -1) for part in parts]
    return TextKV(tuple(layers), torch.cat(counts))


class Executor:
    """Runs groups of visits and keeps what is between them: latents in flight and the rings.

    Args:
        models: one for each step (the same one repeated, or experts). plan: of the visits; ``num_blocks`` of the walk.
        schedule: noise levels. cache: the rings of the plan's caches. text: of a block, [B or 1, L, text_dim].
        noise, renoise: initial and step noise. prefix: clean frames [B, F, C, H, W] or None.
        first_frame: id of the video's first frame. trajectory: "sde" | "ode".
        context_noise: timestep that finished blocks are cached at.
    """

    def __init__(
        self,
        models: Sequence[HiARTransformer],
        plan: Plan,
        num_blocks: int | None,
        schedule: FlowSchedule,
        cache: RingCache,
        grid: tuple[int, int],
        text: TextSource,
        noise: NoiseSource,
        renoise: NoiseSource,
        prefix: Tensor | None,
        first_frame: int,
        trajectory: str,
        context_noise: float,
    ) -> None:
        self.models, self.plan, self.num_blocks, self.cache, self.grid = models, plan, num_blocks, cache, grid
        self.text, self.noise, self.renoise, self.prefix = text, noise, renoise, prefix
        self.first_frame, self.trajectory = first_frame, trajectory
        weight = models[0].patch_embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.sigmas = torch.tensor(schedule.sigmas, dtype=torch.promote_types(self.dtype, torch.float32))
        # one row for each noise level, and a last one for the clean prefix
        levels = [TRAIN_TIMESTEPS * s for s in schedule.sigmas[:-1]] + [context_noise, 0.0]
        self.clean = len(levels) - 1
        timesteps = torch.tensor([levels], dtype=torch.float64, device=self.device)
        self.tables = {id(m): m.modulation(timesteps, len(levels)) for m in models}
        self.texts = _TextCache(limit=2 * len(models) + 2)
        self.latents: dict[tuple[int, int], Tensor] = {}  # (level, block) -> x
        self.readers: dict[tuple[int, int], int] = {}  # visits that still need it
        self.unchecked: list[tuple[Visit, Tensor]] = []  # "is finite", left on the device
        self.counters = Counters()
        self.step = 0

    @torch.no_grad()
    def run(self, group: Group) -> list[tuple[int, Tensor]]:
        """Execute one group; returns the blocks that it finished, (block, latents [B, F, C, H, W])."""
        if self.plan.order == "step_first" and group[0][-1].step != self.step:
            self.step = group[0][-1].step
            self.cache.reset()  # one ring serves all steps, one after another
        inputs = [[self._input(visit) for visit in row] for row in group]
        finished = []
        for run in self._launches(group):
            rows = [group[i] for i in run]
            for visit, latents in self._launch(rows, [torch.cat(inputs[i], 1) for i in run]):
                self._put(visit.step + 1, visit.block, latents)
                if visit.step + 1 == self.plan.steps:
                    finished.append((visit.block, latents))
        for row in group:
            for visit in row:
                self._release(visit)
        return finished

    # Latents in flight.

    def _input(self, visit: Visit) -> Tensor:
        if visit.kind == "cache" and visit.block < self.plan.prefix_blocks:
            assert self.prefix is not None
            start, stop = self.plan.block_frames(visit.block)
            return self.prefix[:, start:stop].to(self.device, self.dtype)
        level = visit.step if visit.kind == "denoise" else visit.step + 1
        if level == 0 and (0, visit.block) not in self.latents:
            self._put(0, visit.block, self.noise(-1, visit.block).to(self.device, self.dtype))
        return self.latents[level, visit.block]

    def _put(self, level: int, block: int, latents: Tensor) -> None:
        readers = int(level < self.plan.steps)
        readers += level > 0 and self.plan.has_cache(level - 1, block, self.num_blocks)
        if readers:
            self.latents[level, block], self.readers[level, block] = latents, readers

    def _release(self, visit: Visit) -> None:
        key = (visit.step if visit.kind == "denoise" else visit.step + 1, visit.block)
        if key in self.readers:
            self.readers[key] -= 1
            if not self.readers[key]:
                del self.readers[key], self.latents[key]

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

    def _launch(self, rows: list[Row], inputs: list[Tensor]) -> list[tuple[Visit, Tensor]]:
        """Run rows as one batch: [rows * B, frames, C, H, W]; returns the denoised latents of each denoise visit."""
        plan, batch = self.plan, self.cache.batch
        model = self.models[rows[0][-1].step]
        frames = [[f for v in row for f in range(*plan.block_frames(v.block))] for row in rows]
        levels = [[self._level(v) for v in row for _ in range(*plan.block_frames(v.block))] for row in rows]
        wanted = [i for i, row in enumerate(rows) if row[-1].kind == "denoise"]
        first = len(frames[0]) - len(range(*plan.block_frames(rows[0][-1].block))) if wanted else 0
        live = None
        if first or len(wanted) < len(rows):
            live = Live(tuple(i * batch + b for i in wanted for b in range(batch)), first)
        x = torch.cat(inputs)
        velocity = model.run(
            x, self._modulation(model, levels), self._text(model, rows), self._attend(rows, frames), live
        )
        self.counters.launches += 1
        self.counters.denoise += len(wanted)
        self.counters.cache += sum(len(row) for row in rows) - len(wanted)
        if velocity is None:
            return []
        visits = [rows[i][-1] for i in wanted]
        following = self._step(visits, live.select(x) if live else x, velocity)
        return list(zip(visits, following.chunk(len(visits)), strict=True))

    def _level(self, visit: Visit) -> int:
        """Row of the modulation table: the noise level that the network is told."""
        if visit.kind == "denoise":
            return visit.step
        return self.clean if visit.block < self.plan.prefix_blocks else visit.step + 1

    def _modulation(self, model: HiARTransformer, levels: list[list[int]]) -> Modulation:
        table = self.tables[id(model)]
        index = torch.tensor(levels, device=self.device).repeat_interleave(self.cache.batch, 0)
        return Modulation(table.embedding[0][index], table.blocks[0][index])

    def _text(self, model: HiARTransformer, rows: list[Row]) -> TextKV:
        texts = [self.text(row[-1].block) for row in rows]
        if any(len(row) == 2 and self.text(row[0].block) is not text for row, text in zip(rows, texts, strict=True)):
            raise ValueError(
                "pairs=True needs one text for all blocks: both visits of a pair share their cross-attention"
            )
        return self.texts.get(model, texts)

    def _attend(self, rows: list[Row], frames: list[list[int]]) -> RingAttend:
        plan = self.plan
        steps = [row[-1].step for row in rows]
        index = [plan.cache_index(s) for s in steps]
        stride = index[1] - index[0] if len(index) > 1 else 1
        windows = tuple(plan.window_frames[s] for s in steps for _ in range(self.cache.batch))
        mask = BlockCausal(
            self.cache.frame_tokens,
            plan.frames_per_block,
            windows,
            plan.sink_frames,
            self.first_frame,
            plan.first_block_frames,
        )
        lends = [plan.cache_source == "next_step" and row[-1].kind == "denoise" and row[-1].step > 0 for row in rows]
        caches = slice(index[0], index[-1] + 1, stride)
        return RingAttend(self.cache, caches, frames, self.grid, self.first_frame, mask, lends)

    def _step(self, visits: list[Visit], x: Tensor, velocity: Tensor) -> Tensor:
        """x[s + 1] of each visit; after the last step that is x0."""
        steps = torch.tensor([v.step for v in visits]).repeat_interleave(self.cache.batch)
        sigma, following = self.sigmas[steps][:, None], self.sigmas[steps + 1][:, None]
        noise = None
        if self.trajectory == "sde":
            shape = (len(x) // len(visits), *x.shape[1:])
            parts = [
                self.renoise(v.step, v.block) if v.step + 1 < self.plan.steps else torch.zeros(shape) for v in visits
            ]
            noise = torch.cat([part.to(self.device, self.dtype) for part in parts])
        result = flow_step(x, velocity, sigma.to(self.device), following.to(self.device), noise)[1]
        self.unchecked += [
            (v, torch.isfinite(part).all()) for v, part in zip(visits, result.chunk(len(visits)), strict=True)
        ]
        # a look at device memory waits for it: on an accelerator once a finished block, not once a visit
        if self.device.type == "cpu" or any(v.step + 1 == self.plan.steps for v in visits):
            self._check_finite()
        return result

    def _check_finite(self) -> None:
        finite = torch.stack([flag for _, flag in self.unchecked]).tolist()
        bad = [visit for (visit, _), good in zip(self.unchecked, finite, strict=True) if not good]
        self.unchecked.clear()
        if bad:
            raise FloatingPointError(f"latents are not finite from step {bad[0].step} of block {bad[0].block} on")

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Copies of the rings, the latents in flight and the position inside step_first."""
        latents = {f"{level}/{block}": x.clone() for (level, block), x in self.latents.items()}
        return {"cache": self.cache.state_dict(), "latents": latents, "step": self.step}

    def load_state_dict(self, state: dict[str, Any], done: Callable[[Visit], bool]) -> None:
        """Take over a saved state; ``done`` tells which visits were executed before it."""
        self.cache.load_state_dict(state["cache"])
        self.latents, self.readers, self.step = {}, {}, state["step"]
        for name, x in state["latents"].items():
            level, block = map(int, name.split("/"))
            self._put(level, block, x.to(self.device, self.dtype).clone())
            for visit in (Visit("denoise", level, block), Visit("cache", level - 1, block)):
                if visit.step in range(self.plan.steps) and done(visit):
                    self._release(visit)
