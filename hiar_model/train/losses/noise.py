"""Noise levels and noised latents of flow matching, as tensors."""

from __future__ import annotations

from torch import Tensor

from ...config.flow_schedule import shift_sigma


def shift_tensor(sigma: Tensor, shift: float) -> Tensor:
    """:func:`hiar_model.config.flow_schedule.shift_sigma` of every element."""
    return shift_sigma(sigma, shift)  # type: ignore[arg-type,return-value]


def add_noise(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise for sigma [B]."""
    s = sigma.view(-1, *[1] * (x0.dim() - 1))
    return (1 - s) * x0 + s * noise
