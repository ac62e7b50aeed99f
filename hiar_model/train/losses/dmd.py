"""Distribution matching distillation (Yin et al. 2024, arXiv 2311.18828) for flow matching: the reverse KL.

The teacher ("real") knows the velocity of the data, the critic ("fake") learns that of the student's videos; where they
disagree on a noised video of the student, it moves towards the teacher. Both are bidirectional and take one noise level
for a whole video. Networks run in the dtype of their weights; everything else is float32 or wider.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...common.keyed import Generator, draw_whole
from ...config import TRAIN_TIMESTEPS, sigma_table
from ...models.transformer import HiARTransformer
from .noise import add_noise
from .teacher import flow_matching_loss

TIMESTEPS = (20.0, 980.0)  # of 1000: nearer to an end neither network has anything to say


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


def predict_x0(model: HiARTransformer, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> Tensor:
    """x_t - sigma v of a bidirectional network; latents [B, F, C, H, W], sigma [B] -> float32 or wider."""
    x, sigma = _wide(latents), sigma.to(latents.device)
    velocity = model(latents, TRAIN_TIMESTEPS * sigma.double(), prompt_embeds)
    return x - sigma.to(x.dtype).view(-1, 1, 1, 1, 1) * velocity.to(x.dtype)


@torch.no_grad()
def dmd_gradient(
    x0: Tensor, fake_x0: Tensor, real_cond_x0: Tensor, real_uncond_x0: Tensor, guidance: float = 3.0
) -> Tensor:
    """Normalised gradient of the reverse KL in x0: (f - r) / mean |x0 - r|, r = cond + guidance (cond - uncond).

    Args:
        x0: the student's videos. fake_x0: the critic's prediction from them, noised. real_cond_x0, real_uncond_x0: the
            teacher's, with the prompt and without. All [B, F, C, H, W].
        guidance: 0 is the prompt alone; 3 is what classifier-free guidance calls 4.

    Returns:
        [B, F, C, H, W], float32 or wider, without gradient.

    Raises:
        ValueError: shapes differ. FloatingPointError: a normaliser is 0 or not finite, with its sample.

    Example:
        >>> import torch
        >>> from hiar_model.train import dmd_gradient
        >>> x0 = torch.zeros(1, 3, 2, 4, 4)
        >>> gradient = dmd_gradient(x0, x0 + 1, x0 + 2, x0 + 2)
        >>> gradient.shape, float(gradient.mean())
        (torch.Size([1, 3, 2, 4, 4]), -0.5)
    """
    others = {"fake_x0": fake_x0, "real_cond_x0": real_cond_x0, "real_uncond_x0": real_uncond_x0}
    for name, x in others.items():
        if x.shape != x0.shape or x.dim() != 5:
            raise ValueError(
                f"dmd_gradient: {name} must be [B, F, C, H, W] like x0 {list(x0.shape)}, got {list(x.shape)}"
            )
    gradient, normaliser = _normalised(x0, fake_x0, real_cond_x0, real_uncond_x0, guidance)
    bad = [f"{value} in sample {i}" for i, value in enumerate(normaliser.tolist()) if not 0 < value < float("inf")]
    if bad:
        raise FloatingPointError(f"dmd: the normaliser mean |x0 - real x0| must be positive, got {', '.join(bad)}")
    return gradient


def _normalised(x0: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
    """(gradient, normaliser [B]); the gradient is NaN in samples whose normaliser is 0 or not finite."""
    x0, fake, cond, uncond = map(_wide, (x0, fake, cond, uncond))
    real = cond + guidance * (cond - uncond)
    scale = (x0 - real).abs().flatten(1).mean(1)
    valid = torch.where((scale > 0) & (scale < torch.inf), scale, torch.nan)
    return (fake - real) / valid.view(-1, 1, 1, 1, 1), scale


def dmd_loss(x0: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """0.5 mse(x0, stop(x0 - gradient)): a scalar whose gradient in x0 is ``gradient`` over the numbers averaged.

    Args:
        x0, gradient: [B, F, C, H, W]. mask: [B, F], frames that count (1 or True); default: all.

    Raises:
        ValueError: shapes differ, or the mask leaves no frame.

    Example:
        >>> import torch
        >>> from hiar_model.train import dmd_loss
        >>> x0 = torch.zeros(1, 3, 2, 4, 4, requires_grad=True)
        >>> loss = dmd_loss(x0, torch.full_like(x0, -0.5))
        >>> loss.item(), torch.autograd.grad(loss, x0)[0].sum().item()
        (0.125, -0.5)
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


class DMDResult(NamedTuple):
    """The loss of a generator update (scalar, with gradient), and the normaliser of each video [B]."""

    loss: Tensor
    normaliser: Tensor


def distribution_matching(
    x0: Tensor,
    prompt_embeds: Tensor,
    unconditional: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    teacher: HiARTransformer,
    critic: HiARTransformer,
    guidance: float = 3.0,
    mask: Tensor | None = None,
) -> DMDResult:
    """The generator's loss: noise its videos, evaluate critic and teacher, and move from the one towards the other.

    Does not wait for the device: if a sample's normaliser is 0 or not finite, the loss is NaN, and the trainer stops
    when it reads that.

    Args:
        x0: [B, F, C, H, W] with gradient. prompt_embeds: [B, L, text_dim]. unconditional: [1 or B, L, text_dim], for
            guidance. sigma: [B], on any device. noise: like x0. mask: [B, F], frames that count.
    """
    with torch.no_grad():
        x = _wide(x0)
        noised = add_noise(x, sigma.to(x), noise)
        fake = predict_x0(critic, noised, sigma, prompt_embeds)
        cond = predict_x0(teacher, noised, sigma, prompt_embeds)
        uncond = predict_x0(teacher, noised, sigma, unconditional.expand(len(x), -1, -1))
        gradient, normaliser = _normalised(x, fake, cond, uncond, guidance)
    return DMDResult(dmd_loss(x0, gradient, mask), normaliser)


def critic_loss(model: HiARTransformer, x0: Tensor, prompt_embeds: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Flow matching on the student's videos: mse(v, noise - x0) of a bidirectional network; no gradient into x0.

    Args:
        x0, noise: [B, F, C, H, W]. prompt_embeds: [B, L, text_dim]. sigma: [B], on any device.
    """
    return flow_matching_loss(model, _wide(x0.detach()), prompt_embeds, sigma.to(x0.device), noise)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
