"""Self-rollout with a gradient: the student is trained on what it makes itself.

1. The visits of its own rollout, without gradient, up to and including an exit step: the executor of
   :mod:`hiar_model.rollout` walks them. What stays are the inputs x[s][n] of the exit step's denoise visits and the
   keys and values that they saw.
2. One parallel forward with gradient of all blocks of that step over those keys, which are constants. It is what the
   exit step's visits computed one by one; autograd never passes through the executor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from hiar_kernels import KVContext

from ...common.keyed import Generator, draw_whole
from ...models.flow_schedule import TRAIN_TIMESTEPS, FlowSchedule
from ...models.kv_cache import RingCache
from ...models.transformer import HiARTransformer
from ...rollout import Rollout
from ...rollout.prompt_cache import trim_padding
from ...schedule.plan import Plan, Visit, windows_per_step


@dataclass(frozen=True)
class Visited:
    """The denoise visits of one step, ready to be computed again in one forward.

    Attributes:
        step: their step. sigma: its noise level. window_frames: its window.
        inputs: x[step][n] of all blocks, [B, F, C, H, W].
        contexts: for each layer the keys and values that the visits saw of other blocks; constants.
    """

    step: int
    sigma: float
    window_frames: int | None
    inputs: Tensor
    contexts: tuple[KVContext, ...]


class SelfRollout:
    """Rolls a student out as it will be used, and predicts the clean video of one step with gradient.

    Both parts work in the dtype of the weights, or in that of autocast where the caller has turned it on (for both):
    float32 weights under bfloat16 autocast keep float32 latents. x0 is float32 or wider.

    Args:
        model: the student; one for all steps. schedule: noise levels.
        order: how the student will be rolled out. "step_first", "stream" and "wavefront" are one graph, matched noise;
            "block_first" is the clean context of Self-Forcing (Huang et al. 2025, arXiv 2506.08009).
        cache_source, frames_per_block, window_frames, sink_frames, trajectory, context_noise, pairs: as for
            :class:`hiar_model.Rollout`.

    Raises:
        ValueError: options that do not fit together, with the legal values.
    """

    def __init__(
        self,
        model: HiARTransformer,
        schedule: FlowSchedule,
        *,
        order: str = "step_first",
        cache_source: str = "own",
        frames_per_block: int = 3,
        window_frames: int | None | Sequence[int | None] = None,
        sink_frames: int = 0,
        trajectory: str = "sde",
        context_noise: float = 0.0,
        pairs: bool = False,
    ) -> None:
        self.model, self.schedule = model, schedule
        self.windows = windows_per_step(window_frames, len(schedule))
        Plan(len(schedule), order, frames_per_block, 0, self.windows, sink_frames, cache_source, pairs)  # refuses
        self.graph = Plan(len(schedule), order, frames_per_block).graph
        self.lent = cache_source == "next_step"
        # of the matched walks step_first can stop at a step and needs one ring; lent keys come from later steps
        self.order = order if self.graph == "clean" else "stream" if self.lent else "step_first"
        self.frames_per_block, self.sink_frames = frames_per_block, sink_frames
        self.options: dict[str, Any] = {
            "order": self.order,
            "cache_source": cache_source,
            "frames_per_block": frames_per_block,
            "sink_frames": sink_frames,
            "trajectory": trajectory,
            "context_noise": context_noise,
            "pairs": pairs,
        }

    @torch.no_grad()
    def run(
        self,
        text: Tensor,
        num_frames: int,
        height: int,
        width: int,
        exit_step: int,
        *,
        seed: int = 0,
        video_ids: Sequence[int] | None = None,
        noise: Tensor | None = None,
    ) -> Visited:
        """The visits up to and including those of the exit step.

        In the matched graph the walk stops there; lent keys of a step come from the next one, so there the whole walk
        is made. In the clean graph the blocks are finished at the exit step, with the schedule that ends there.

        Args:
            text: [B or 1, L, text_dim]. num_frames, height, width: of the latents.
            exit_step: 0 to S - 1; draw one for all ranks (:func:`draw_exit_step`).
            seed, video_ids: key of the noise, so a video does not depend on rank or batch; ``video_ids`` [B], default
                0..B-1 of the texts. noise: initial noise [B, F, C, H, W] instead of the keyed one.

        Raises:
            ValueError: sizes or the exit step do not fit.
            FloatingPointError: latents that are not finite, with step and block.
        """
        steps = len(self.schedule)
        if not 0 <= exit_step < steps:
            raise ValueError(f"exit_step must be 0 to {steps - 1}, got {exit_step}")
        schedule, windows = self.schedule, self.windows
        if self.graph == "clean":  # the next level of the exit step is then 0: what it denoises is finished
            schedule, windows = FlowSchedule(schedule.steps[: exit_step + 1], schedule.shift), windows[: exit_step + 1]
        ids = range(text.shape[0] if noise is None else noise.shape[0]) if video_ids is None else video_ids
        made = Rollout(
            self.model,
            text,
            schedule,
            num_frames=num_frames,
            height=height,
            width=width,
            batch=len(ids),
            window_frames=windows,
            seed=seed,
            video_ids=list(ids),
            noise=noise,
            keep_frames=True,
            autocast=True,
            **self.options,
        )
        inputs: dict[int, Tensor] = {}

        def keep(visit: Visit, latents: Tensor) -> None:
            if visit.step == exit_step:
                inputs[visit.block] = latents.clone()

        made.executor.on_denoise = keep
        groups = made.groups(made.num_blocks)
        if self.order == "step_first":
            groups = takewhile(lambda group: group[0][-1].step <= exit_step, groups)
        for group in groups:
            made.executor.run(group)
        contexts = _contexts(made.executor.cache, made.plan.cache_index(exit_step))
        x = torch.cat([inputs[block] for block in sorted(inputs)], 1)
        return Visited(exit_step, self.schedule.sigmas[exit_step], self.windows[exit_step], x, contexts)

    def predict(self, visited: Visited, text: Tensor) -> Tensor:
        """Clean latents x0 = x - sigma v of all blocks in one forward, with gradient to every weight it passes.

        Args:
            text: the one that was visited with; its keys carry gradient here, those of the contexts do not.

        Returns:
            [B, F, C, H, W], float32 or wider.
        """
        x = visited.inputs
        sigma = torch.full(x.shape[:1], visited.sigma, dtype=torch.float64, device=x.device)
        velocity = self.model(
            x,
            TRAIN_TIMESTEPS * sigma,
            trim_padding(text),
            "block_causal",
            frames_per_block=self.frames_per_block,
            window_frames=visited.window_frames,
            sink_frames=self.sink_frames,
            context=visited.contexts,
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) - visited.sigma * velocity.to(wide)


def _contexts(cache: RingCache, index: int) -> tuple[KVContext, ...]:
    """The keys of one ring, for each layer; taken out of the cache, so that the rings of other steps are let go."""
    alone, frames, found = len(cache.capacities) == 1, cache.frames[index].clone(), []
    ids = [list(cache.held[index])]
    while cache.k:
        k, v = (rings.pop(0)[index] for rings in (cache.k, cache.v))
        k, v = (k, v) if alone else (k.clone(), v.clone())
        found.append(KVContext(k, v, frames, host_frames=ids))
    return tuple(found)


def draw_exit_step(steps: int, generator: Generator) -> int:
    """Uniform over 0..steps-1. Give every rank the same generator: all of them must leave at one step."""
    return int(draw_whole(generator, steps))
