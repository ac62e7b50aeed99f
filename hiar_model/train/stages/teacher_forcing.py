"""Matched-noise teacher forcing: train on exactly the contexts that a hierarchical rollout shows.

A context copy of the clip at the next noise level leaves its keys and values, as cache visits do; a target copy at the
step's own level is denoised over them, as denoise visits do. One pair of forwards trains every block of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...common.keyed import Generator, draw_uniform, draw_whole, keyed_generator
from ...io.video import Frames
from ...models.flow_schedule import FlowSchedule, shift_sigma
from ...models.transformer import HiARTransformer
from ..config.recipe import LevelsRecipe, TeacherForcingRecipe
from ..engine.networks import make_network
from ..losses.context import velocity_over_context
from .base import Scalars, Stage, Turn
from .sources import Sources, sample_videos, save_student


class TeacherForcing(Stage):
    """The stage: clips, levels and noise of every row from keys of its own."""

    averaged = "student"

    def __init__(self, recipe: TeacherForcingRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.sources = Sources(recipe, device)
        self.trained = {"student": make_network(recipe.model, seed=recipe.seed, weights=recipe.init)}
        self.frozen: dict[str, HiARTransformer] = {}
        share = 1.0 if self.sources.codec is None else recipe.data.from_start
        first, later = (self._weights([begins]).sum() for begins in (True, False))
        # A clip's weight on average: a constant, so that parts of a batch add up to the loss of the whole.
        self.mean_weight = float(share * first + (1 - share) * later)

    def turns(self, update: int) -> Sequence[Turn]:
        return (Turn("student"),)

    def loss(self, turn: Turn, update: int, rows: Sequence[int]) -> tuple[Tensor, Scalars]:
        r = self.recipe
        batch = self.sources.clips().clips(r.seed, r.stage, update, rows)
        generators = [keyed_generator(r.seed, r.stage, update, row, "noise") for row in rows]
        levels = [sample_levels(r.levels, 1, r.schedule, g) for g in generators]
        target, context = (torch.cat(parts) for parts in zip(*levels, strict=True))
        noise, other = torch.stack([g.normals(2, *batch.latents.shape[1:]) for g in generators], 1)
        tensors = (batch.latents, batch.text, target, context, noise, other)
        window = r.window_frames
        assert not isinstance(window, tuple)  # the recipe sees to it
        errors = teacher_forcing_errors(
            self.trained["student"],
            *(x.to(self.device) for x in tensors),
            frames_per_block=r.frames_per_block,
            window_frames=window,
            sink_frames=r.sink_frames,
        )
        weights = self._weights(batch.from_start.tolist()).to(self.device)
        return (errors * weights).sum(1).mean() / self.mean_weight, {}

    def _weights(self, from_start: Sequence[bool]) -> Tensor:
        r = self.recipe
        return loss_weights(from_start, r.num_frames, r.frames_per_block, r.first_block_weight)

    def sample(self, update: int) -> Frames | None:
        return sample_videos(self.sources, self.trained["student"], self.recipe)

    def export(self, model: HiARTransformer, folder: Path) -> Path:
        return save_student(self.sources, model, self.recipe, folder)


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


def shift_tensor(sigma: Tensor, shift: float) -> Tensor:
    """:func:`hiar_model.models.flow_schedule.shift_sigma` for a tensor."""
    return shift_sigma(sigma, shift)  # type: ignore[arg-type,return-value]


def add_noise(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise for sigma [B]."""
    s = sigma.view(-1, *[1] * (x0.dim() - 1))
    return (1 - s) * x0 + s * noise


def teacher_forcing_errors(
    model: HiARTransformer,
    x0: Tensor,
    text: Tensor,
    target_sigma: Tensor,
    context_sigma: Tensor,
    noise: Tensor,
    context_noise: Tensor,
    *,
    frames_per_block: int,
    window_frames: int | None = None,
    sink_frames: int = 0,
) -> Tensor:
    """Mean squared error of the velocity eps - x0 of every frame, float32 [B, F]; all blocks at once.

    Args:
        x0, noise, context_noise: clean latents, and the noise of the two copies, [B, F, C, H, W].
        text: [B, L, text_dim]. target_sigma, context_sigma: [B].
    """
    velocity = velocity_over_context(
        model,
        add_noise(x0, target_sigma, noise),
        add_noise(x0, context_sigma, context_noise),
        text,
        target_sigma,
        context_sigma,
        frames_per_block=frames_per_block,
        window_frames=window_frames,
        sink_frames=sink_frames,
    )
    return (velocity.float() - (noise - x0)).square().mean(dim=(2, 3, 4))


def loss_weights(from_start: Sequence[bool], frames: int, frames_per_block: int, first_block: float = 1.0) -> Tensor:
    """[B, F]: ``first_block`` for the first block of a video, 1 for later blocks.

    Of a clip from the middle of a video the first block does not count, since its context is missing.
    """
    begins = torch.tensor(from_start)
    weight = torch.ones(len(begins), frames)
    weight[begins, :frames_per_block] = first_block
    weight[~begins, :frames_per_block] = 0
    return weight
