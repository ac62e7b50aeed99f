"""Distribution matching distillation (Yin et al. 2024, arXiv 2311.18828) for flow matching: the reverse KL.

The teacher ("real") knows the velocity of the data, the critic ("fake") learns that of the student's videos; where they
disagree on a noised video of the student, it moves towards the teacher. Both are bidirectional and are told one noise
level for a whole video. Networks run in whatever dtype they have; all else is float32 or wider.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...common.keyed import Generator, draw_whole
from ...models.flow_schedule import TRAIN_TIMESTEPS, sigma_table
from ...models.transformer import HiARTransformer
from ..stages.teacher_forcing import add_noise
from .teacher import flow_matching_loss

TIMESTEPS = (20.0, 980.0)  # of 1000: closer to an end neither network knows anything, or nothing is left to say


def draw_sigma(batch: int, shift: float, generator: Generator, timesteps: tuple[float, float] = TIMESTEPS) -> Tensor:
    """One noise level for each video, [batch] float32: uniform in the table of training, shifted, clamped.

    Args:
        shift: of the student's schedule. timesteps: least and greatest, of 1000.
    """
    low, high = timesteps
    if not 0 < low <= high <= TRAIN_TIMESTEPS:
        raise ValueError(f"timesteps must be (low, high) with 0 < low <= high <= {TRAIN_TIMESTEPS}, got {timesteps}")
    table = torch.tensor(sigma_table(TRAIN_TIMESTEPS, shift), dtype=torch.float64)
    drawn = table[draw_whole(generator, TRAIN_TIMESTEPS, batch)]
    return drawn.clamp(low / TRAIN_TIMESTEPS, high / TRAIN_TIMESTEPS).float()


def predict_x0(model: HiARTransformer, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """x_t - sigma v of a bidirectional network; latents [B, F, C, H, W], sigma [B] -> float32 or wider."""
    x, sigma = _wide(latents), sigma.to(latents.device)
    velocity = model(latents, TRAIN_TIMESTEPS * sigma.double(), text)
    return x - sigma.to(x.dtype).view(-1, 1, 1, 1, 1) * velocity.to(x.dtype)


@torch.no_grad()
def dmd_gradient(
    x0: Tensor, fake_x0: Tensor, real_cond_x0: Tensor, real_uncond_x0: Tensor, guidance: float = 3.0
) -> Tensor:
    """Normalised gradient of the reverse KL in x0: (f - r) / mean |x0 - r|, r = cond + guidance (cond - uncond).

    Args:
        x0: the student's videos. fake_x0: what the critic makes of them, noised. real_cond_x0, real_uncond_x0: what the
            teacher does, with prompt and without. All [B, F, C, H, W].
        guidance: 0 is the prompt alone; 3 is what classifier-free guidance calls 4.

    Returns:
        [B, F, C, H, W], float32 or wider, without gradient.

    Raises:
        ValueError: shapes differ. FloatingPointError: a normaliser is 0 or not finite, with its row.
    """
    others = {"fake_x0": fake_x0, "real_cond_x0": real_cond_x0, "real_uncond_x0": real_uncond_x0}
    for name, x in others.items():
        if x.shape != x0.shape or x.dim() != 5:
            raise ValueError(
                f"dmd_gradient: {name} must be [B, F, C, H, W] like x0 {list(x0.shape)}, got {list(x.shape)}"
            )
    return _normalised(x0, fake_x0, real_cond_x0, real_uncond_x0, guidance)[0]


def _normalised(x0: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
    """(gradient, normaliser [B])."""
    x0, fake, cond, uncond = map(_wide, (x0, fake, cond, uncond))
    real = cond + guidance * (cond - uncond)
    scale = (x0 - real).abs().flatten(1).mean(1)
    bad = [f"{value} in row {row}" for row, value in enumerate(scale.tolist()) if not 0 < value < float("inf")]
    if bad:
        raise FloatingPointError(f"dmd: the normaliser mean |x0 - real x0| must be positive, got {', '.join(bad)}")
    return (fake - real) / scale.view(-1, 1, 1, 1, 1), scale


def dmd_loss(x0: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """0.5 mse(x0, stop(x0 - gradient)): a scalar whose gradient in x0 is ``gradient`` over the numbers averaged.

    Args:
        x0, gradient: [B, F, C, H, W]. mask: [B, F], frames that count (1 or True); default: all.
    """
    if gradient.shape != x0.shape:
        raise ValueError(f"dmd_loss: gradient must be {list(x0.shape)} like x0, got {list(gradient.shape)}")
    x = _wide(x0)
    error = (x - (x - gradient.to(x.dtype)).detach()).square()
    if mask is None:
        return 0.5 * error.mean()
    if mask.shape != x0.shape[:2]:
        raise ValueError(f"dmd_loss: mask must be [B, F] = {list(x0.shape[:2])}, got {list(mask.shape)}")
    weight = mask.to(x.dtype)
    total = weight.sum()
    if not bool(total > 0):
        raise ValueError("dmd_loss: the mask leaves no frame")
    return 0.5 * (error.mean(dim=(2, 3, 4)) * weight).sum() / total


class Matched(NamedTuple):
    """What a generator update has found out: the loss (scalar, with gradient) and figures to watch, each [B]."""

    loss: Tensor
    normaliser: Tensor
    gradient_norm: Tensor


def distribution_matching(
    x0: Tensor,
    text: Tensor,
    unconditional: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    teacher: HiARTransformer,
    critic: HiARTransformer,
    guidance: float = 3.0,
    mask: Tensor | None = None,
) -> Matched:
    """The generator's loss: noise its videos, ask both networks, and go from the one towards the other.

    Args:
        x0: [B, F, C, H, W] with gradient. text: [B, L, text_dim]. unconditional: [1 or B, L, text_dim], for guidance.
        sigma: [B], on any device. noise: like x0. mask: [B, F], frames that count.

    Raises:
        FloatingPointError: a normaliser is 0 or not finite, with its row.
    """
    with torch.no_grad():
        x = _wide(x0)
        noised = add_noise(x, sigma.to(x), noise)
        fake = predict_x0(critic, noised, sigma, text)
        cond = predict_x0(teacher, noised, sigma, text)
        uncond = predict_x0(teacher, noised, sigma, unconditional.expand(len(x), -1, -1))
        gradient, normaliser = _normalised(x, fake, cond, uncond, guidance)
    return Matched(dmd_loss(x0, gradient, mask), normaliser, gradient.flatten(1).norm(dim=1))


def critic_loss(model: HiARTransformer, x0: Tensor, text: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Flow matching on the student's videos: mse(v, noise - x0) of a bidirectional network; no gradient into x0.

    Args:
        x0, noise: [B, F, C, H, W]. text: [B, L, text_dim]. sigma: [B], on any device.
    """
    return flow_matching_loss(model, _wide(x0.detach()), text, sigma.to(x0.device), noise)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
