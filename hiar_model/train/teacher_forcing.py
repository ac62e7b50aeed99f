"""Matched-noise teacher forcing: train on exactly the contexts that a hierarchical rollout shows.

A context copy of the clip at the next noise level leaves its keys and values, as cache visits do; a target copy at the
step's own level is denoised over them, as denoise visits do. One pair of forwards trains every block of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schedule import TRAIN_TIMESTEPS, FlowSchedule, shift_sigma
from ..transformer import HiARTransformer


@dataclass(frozen=True)
class LevelMixture:
    """How noise levels of (target, context) are drawn.

    Args:
        matched: share of (sigma_s, sigma_{s+1}) of the schedule, s uniform: step-first order.
        clean: share of (sigma_s, 0): block-first order, which conditions on clean context.
        continuous: share of any level with a context a random gap below: other step counts.
    """

    matched: float = 0.55
    clean: float = 0.2
    continuous: float = 0.25

    def __post_init__(self) -> None:
        shares = (self.matched, self.clean, self.continuous)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"LevelMixture: shares must be at least 0 and sum to 1, got {list(shares)}")

    def sample(self, batch: int, schedule: FlowSchedule, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(sigma of the target, sigma of the context), each [batch] float32."""
        sigmas = torch.tensor(schedule.sigmas)
        step = torch.randint(len(schedule), (batch,), generator=generator)
        kind, level, gap = torch.rand(3, batch, generator=generator)
        level = 1 - level  # (0, 1]
        lower = (level - gap).clamp(min=0)
        target, context = sigmas[step], sigmas[step + 1]
        context = torch.where(kind < self.matched, context, 0)
        free = kind >= self.matched + self.clean
        target = torch.where(free, shift_tensor(level, schedule.shift), target)
        return target, torch.where(free, shift_tensor(lower, schedule.shift), context)


def shift_tensor(sigma: Tensor, shift: float) -> Tensor:
    """:func:`hiar_model.schedule.shift_sigma` for a tensor."""
    return shift_sigma(sigma, shift)  # type: ignore[arg-type,return-value]


def add_noise(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise for sigma [B]."""
    s = sigma.view(-1, *[1] * (x0.dim() - 1))
    return (1 - s) * x0 + s * noise


def teacher_forcing_loss(
    model: HiARTransformer,
    x0: Tensor,
    text: Tensor,
    target_sigma: Tensor,
    context_sigma: Tensor,
    generator: torch.Generator,
    *,
    frames_per_block: int,
    window_frames: int | None = None,
    sink_frames: int = 0,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the velocity eps - x0 over all blocks at once.

    Args:
        x0: clean latents [B, F, C, H, W]. text: [B, L, text_dim].
        target_sigma, context_sigma: [B]. weight: [B, F], 0 leaves a frame out; default all 1.
    """
    noise, context_noise = torch.randn((2, *x0.shape), generator=generator)
    rule = {"frames_per_block": frames_per_block, "window_frames": window_frames, "sink_frames": sink_frames}
    frames = x0.shape[1]
    context = model.kv(
        add_noise(x0, context_sigma, context_noise),
        _timesteps(context_sigma, frames),
        text,
        "block_causal",
        **rule,  # type: ignore[arg-type]
    )
    velocity = model(
        add_noise(x0, target_sigma, noise),
        _timesteps(target_sigma, frames),
        text,
        "block_causal",
        context=context,
        **rule,
    )
    error = F.mse_loss(velocity.float(), noise - x0, reduction="none").mean(dim=(2, 3, 4))
    if weight is None:
        return error.mean()
    return (error * weight).sum() / weight.sum()


def _timesteps(sigma: Tensor, frames: int) -> Tensor:
    return (TRAIN_TIMESTEPS * sigma)[:, None].expand(-1, frames)


def loss_weights(
    batch: int, frames: int, from_start: Sequence[bool], frames_per_block: int, first_block: float = 1.0
) -> Tensor:
    """[B, F]: ``first_block`` for the first block of a video, 1 for later blocks.

    Of a clip from the middle of a video the first block does not count, since its context is missing.
    """
    weight = torch.ones(batch, frames)
    begins = torch.tensor(from_start)
    weight[begins, :frames_per_block] = first_block
    weight[~begins, :frames_per_block] = 0
    return weight
