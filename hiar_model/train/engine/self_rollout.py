"""Self-rollout with a gradient: the student is trained on the videos that it makes itself.

1. The tasks of its own rollout up to and including an exit step, without gradient (:class:`hiar_model.Rollout`). What
   is kept: the inputs x[s][n] of the exit step's denoise tasks, and the keys and values that those tasks saw.
2. One parallel forward with gradient of all blocks of that step over those keys, which are constants. It computes what
   the exit step's tasks computed one by one; autograd never passes through the executor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hiar_kernels import KVContext

from ...common.keyed import Generator, draw_whole
from ...config import TRAIN_TIMESTEPS, ExecutionConfig, RolloutConfig
from ...models.kv_cache import RingCache
from ...models.transformer import HiARTransformer
from ...rollout import Rollout
from ...rollout.prompt_cache import trim_padding
from ...schedule.plan import Group, Task


@dataclass(frozen=True)
class ExitStepBatch:
    """The denoise tasks of one step, ready to be computed again in one forward.

    Attributes:
        step: their step. sigma: its noise level.
        inputs: x[step][n] of all blocks, [B, F, C, H, W].
        contexts: for each layer the keys and values that the tasks saw of other blocks; constants.
    """

    step: int
    sigma: float
    inputs: Tensor
    contexts: tuple[KVContext, ...]


class SelfRollout:
    """Rolls a student out as it will be used, and predicts the clean video of one step with gradient.

    Both parts compute in the dtype of the weights, or in autocast's where the caller has turned it on (for both):
    float32 weights under bfloat16 autocast keep float32 latents. x0 is float32 or wider.

    Args:
        model: the student; one for all steps.
        config: how it will be rolled out. The orders step_first, stream and wavefront give one result and train the
            same; block_first is the clean context of Self-Forcing (Huang et al. 2025, arXiv 2506.08009).

    Raises:
        ValueError: ``config.first_frame`` is not 0.
    """

    def __init__(self, model: HiARTransformer, config: RolloutConfig) -> None:
        if config.first_frame:
            raise ValueError(f"first_frame must be 0 in a self-rollout, got {config.first_frame}")
        self.model, self.config = model, config
        if config.order != "block_first":
            # step_first can stop after the exit step and needs one cache; shared keys come from later steps
            self.config = config.with_order("stream" if config.kv_source == "next_step" else "step_first")

    @torch.no_grad()
    def run(
        self,
        prompt_embeds: Tensor,
        num_latent_frames: int,
        latent_size: tuple[int, int],
        exit_step: int,
        *,
        seed: int = 0,
        video_ids: Sequence[int] | None = None,
        noise: Tensor | None = None,
    ) -> ExitStepBatch:
        """The tasks up to and including those of the exit step.

        In the order step_first the rollout stops there. With shared keys, which come from the next step, it runs to its
        end. In the order block_first blocks are finished at the exit step, by the schedule that ends there.

        Args:
            prompt_embeds: [B or 1, L, text_dim]. latent_size: (height, width).
            exit_step: 0 to S - 1; the same on all ranks (:func:`draw_exit_step`).
            seed, video_ids: key of the noise, so a video does not depend on rank or batch; ``video_ids`` [B], default
                0..B-1. noise: initial noise [B, F, C, H, W] instead of the keyed one.

        Raises:
            ValueError: sizes or the exit step do not fit.
            FloatingPointError: latents that are not finite, with step and block.
        """
        config, steps = self.config, len(self.config.steps)
        if not 0 <= exit_step < steps:
            raise ValueError(f"exit_step must be 0 to {steps - 1}, got {exit_step}")
        if config.order == "block_first":  # the level after the exit step is then 0: its blocks are finished
            end = exit_step + 1
            config = replace(config, steps=config.steps[:end], window_frames=config.windows[:end])
        batch = len(prompt_embeds if noise is None else noise)
        rollout = Rollout(
            self.model,
            prompt_embeds,
            config,
            ExecutionConfig(keep_all_frames=True, autocast=True),
            num_latent_frames=num_latent_frames,
            latent_size=latent_size,
            seed=seed,
            video_ids=range(batch) if video_ids is None else video_ids,
            noise=noise,
        )
        inputs: dict[int, Tensor] = {}

        def keep_input(task: Task, latents: Tensor) -> None:
            if task.step == exit_step:
                inputs[task.block] = latents.clone()

        def is_later_step(group: Group) -> bool:
            return config.order == "step_first" and group[0][-1].step > exit_step

        rollout.on_denoise = keep_input
        rollout.run_until(is_later_step)
        contexts = _take_contexts(rollout.cache, rollout.plan.cache_index(exit_step))
        x = torch.cat([inputs[block] for block in sorted(inputs)], 1)
        return ExitStepBatch(exit_step, self.config.schedule.sigmas[exit_step], x, contexts)

    def predict(self, batch: ExitStepBatch, prompt_embeds: Tensor) -> Tensor:
        """Clean latents x0 = x - sigma v of all blocks in one forward, with gradient to every weight it passes.

        Args:
            prompt_embeds: those of :meth:`run`; their keys carry gradient here, those of the contexts do not.

        Returns:
            [B, F, C, H, W], float32 or wider.
        """
        x = batch.inputs
        sigma = torch.full(x.shape[:1], batch.sigma, dtype=torch.float64, device=x.device)
        velocity = self.model(
            x,
            TRAIN_TIMESTEPS * sigma,
            trim_padding(prompt_embeds),
            "block_causal",
            context=batch.contexts,
            **self.config.block_causal(batch.step),
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) - batch.sigma * velocity.to(wide)


def _take_contexts(cache: RingCache, index: int) -> tuple[KVContext, ...]:
    """The keys and values of one ring, for each layer; moved out of the cache, so that other rings are freed."""
    alone, frames, contexts = len(cache.capacities) == 1, cache.frames[index].clone(), []
    ids = [list(cache.slot_frames[index])]
    while cache.k:
        k, v = (rings.pop(0)[index] for rings in (cache.k, cache.v))
        k, v = (k, v) if alone else (k.clone(), v.clone())
        contexts.append(KVContext(k, v, frames, host_frames=ids))
    return tuple(contexts)


def draw_exit_step(steps: int, generator: Generator) -> int:
    """Uniform over 0..steps-1. Give every rank the same generator: all of them must leave at one step."""
    return int(draw_whole(generator, steps))
