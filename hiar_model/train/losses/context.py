"""One parallel forward of a block-causal student over a whole clip as context."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...config import TRAIN_TIMESTEPS
from ...models.transformer import HiARTransformer


def velocity_over_context(
    model: HiARTransformer,
    latents: Tensor,
    context: Tensor,
    prompt_embeds: Tensor,
    sigma: Tensor,
    context_sigma: Tensor,
    context_noise: float = 0.0,
    **mask: Any,
) -> Tensor:
    """Velocity of every block, which sees itself in ``latents`` and earlier blocks in ``context``.

    What denoise tasks compute after cache tasks of ``context``; both forwards carry gradient.

    Args:
        latents, context: [B, F, C, H, W] at the noise levels sigma, context_sigma [B].
        prompt_embeds: [B, L, text_dim]. context_noise: of :class:`hiar_model.RolloutConfig`, the timestep of clean
            context. mask: :meth:`hiar_model.RolloutConfig.block_causal`.

    Returns:
        [B, F, C, H, W].
    """
    frames = latents.shape[1]
    t, context_t = ((TRAIN_TIMESTEPS * s)[:, None].expand(-1, frames) for s in (sigma, context_sigma))
    context_t = context_t.masked_fill(context_t == 0, context_noise)
    keys = model.kv(context, context_t, prompt_embeds, "block_causal", **mask)
    return model(latents, t, prompt_embeds, "block_causal", context=keys, **mask)
