"""One parallel forward of a block-causal student over a whole clip as context."""

from __future__ import annotations

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
    *,
    frames_per_block: int,
    window_frames: int | None = None,
    sink_frames: int = 0,
) -> Tensor:
    """Velocity of every block, which sees itself in ``latents`` and earlier blocks in ``context``.

    What denoise tasks compute after cache tasks of ``context``; both forwards carry gradient.

    Args:
        latents, context: [B, F, C, H, W] at the noise levels sigma, context_sigma [B].
        prompt_embeds: [B, L, text_dim].

    Returns:
        [B, F, C, H, W].
    """
    rule = {"frames_per_block": frames_per_block, "window_frames": window_frames, "sink_frames": sink_frames}
    frames = latents.shape[1]
    keys = model.kv(context, _timesteps(context_sigma, frames), prompt_embeds, "block_causal", **rule)  # type: ignore[arg-type]
    return model(latents, _timesteps(sigma, frames), prompt_embeds, "block_causal", context=keys, **rule)


def _timesteps(sigma: Tensor, frames: int) -> Tensor:
    return (TRAIN_TIMESTEPS * sigma)[:, None].expand(-1, frames)
