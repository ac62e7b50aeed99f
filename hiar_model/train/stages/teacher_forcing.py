"""Matched-noise teacher forcing: train on exactly the contexts that a hierarchical rollout shows.

A context copy of the clip at the next noise level leaves its keys and values, as cache tasks do; a target copy at the
step's own level is denoised over them, as denoise tasks do. One pair of forwards trains every block of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.keyed import Generator, draw_uniform, draw_whole, keyed_generator
from ...config import FlowSchedule
from ...models.transformer import HiARTransformer
from ..config.recipe import LevelsRecipe, TeacherForcingRecipe
from ..engine.networks import make_network
from ..losses.context import velocity_over_context
from ..losses.noise import add_noise, shift_tensor
from .base import Scalars, UpdateStep
from .sources import Sources, StudentStage


class TeacherForcing(StudentStage[TeacherForcingRecipe]):
    """The stage: clips, levels and noise, each keyed by sample."""

    def __init__(self, recipe: TeacherForcingRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.sources = Sources(recipe, device)
        self.trained = {"student": make_network(recipe.model, seed=recipe.seed, weights=recipe.init)}
        self.frozen: dict[str, HiARTransformer] = {}
        share = 1.0 if self.sources.codec is None else recipe.data.from_start
        first, later = (self._weights([from_start]).sum() for from_start in (True, False))
        # A clip's expected weight: a constant, so that micro-batches add up to the loss of the batch.
        self.mean_weight = float(share * first + (1 - share) * later)

    def update_steps(self, update: int) -> Sequence[UpdateStep]:
        return (UpdateStep("student"),)

    def loss(self, step: UpdateStep, update: int, samples: Sequence[int]) -> tuple[Tensor, Scalars]:
        r = self.recipe
        batch = self.sources.clips().clips(r.seed, r.stage, update, samples)
        generators = [keyed_generator(r.seed, r.stage, update, sample, "noise") for sample in samples]
        levels = [sample_levels(r.levels, 1, r.rollout.schedule, g) for g in generators]
        target, context = (torch.cat(parts) for parts in zip(*levels, strict=True))
        noise, other = torch.stack([g.normals(2, *batch.latents.shape[1:]) for g in generators], 1)
        tensors = (batch.latents, batch.prompt_embeds, target, context, noise, other)
        errors = teacher_forcing_errors(
            self.trained["student"],
            *(x.to(self.device) for x in tensors),
            context_timestep=r.rollout.context_noise,
            **r.rollout.block_causal(),
        )
        weights = self._weights(batch.from_start.tolist()).to(self.device)
        return (errors * weights).sum(1).mean() / self.mean_weight, {}

    def _weights(self, from_start: Sequence[bool]) -> Tensor:
        r = self.recipe
        return loss_weights(from_start, r.num_latent_frames, r.rollout.frames_per_block, r.first_block_weight)


def sample_levels(
    levels: LevelsRecipe, batch: int, schedule: FlowSchedule, generator: Generator
) -> tuple[Tensor, Tensor]:
    """(sigma of the target, sigma of the context), each [batch] float32."""
    sigmas = torch.tensor(schedule.sigmas)
    step = draw_whole(generator, len(schedule), batch)
    kind, level, gap = draw_uniform(generator, 3, batch)
    level = 1 - level  # (0, 1]
    lower = (level - gap).clamp(min=0)
    target, context = sigmas[step], sigmas[step + 1]
    context = torch.where(kind < levels.matched, context, 0)
    free = kind >= levels.matched + levels.clean
    target = torch.where(free, shift_tensor(level, schedule.shift), target)
    return target, torch.where(free, shift_tensor(lower, schedule.shift), context)


def teacher_forcing_errors(
    model: HiARTransformer,
    x0: Tensor,
    prompt_embeds: Tensor,
    target_sigma: Tensor,
    context_sigma: Tensor,
    noise: Tensor,
    context_noise: Tensor,
    *,
    context_timestep: float = 0.0,
    **mask: Any,
) -> Tensor:
    """Mean squared error of the velocity eps - x0 of every frame, float32 [B, F]; all blocks at once.

    Args:
        x0, noise, context_noise: clean latents, and the noise of the two copies, [B, F, C, H, W].
        prompt_embeds: [B, L, text_dim]. target_sigma, context_sigma: [B].
        context_timestep: of clean context, ``context_noise`` of :class:`hiar_model.RolloutConfig`.
        mask: :meth:`hiar_model.RolloutConfig.block_causal`.
    """
    velocity = velocity_over_context(
        model,
        add_noise(x0, target_sigma, noise),
        add_noise(x0, context_sigma, context_noise),
        prompt_embeds,
        target_sigma,
        context_sigma,
        context_timestep,
        **mask,
    )
    return (velocity.float() - (noise - x0)).square().mean(dim=(2, 3, 4))


def loss_weights(from_start: Sequence[bool], frames: int, frames_per_block: int, first_block: float = 1.0) -> Tensor:
    """[B, F]: ``first_block`` for the first block of a video, 1 for later blocks.

    The first block of a clip from the middle of a video has weight 0, since its context is missing.
    """
    is_start = torch.tensor(from_start)
    weight = torch.ones(len(is_start), frames)
    weight[is_start, :frames_per_block] = first_block
    weight[~is_start, :frames_per_block] = 0
    return weight
