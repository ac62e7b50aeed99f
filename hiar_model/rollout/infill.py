"""Infilling: make the missing blocks of a clip between the known ones, with bidirectional attention.

All frames go through the network at once and see each other. At every step the known frames are noised to the current
noise level, with the noise that a rollout of this seed has there, so the missing frames see context at their own level
(matched noise) on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hiar_kernels import flow_step

from ..common.checks import as_whole, one_line, one_of, whole
from ..common.settings import own_settings
from ..config import TRAIN_TIMESTEPS, FlowSchedule
from ..config.rollout import SAMPLERS
from ..models.threads import cpu_threads, fitting_threads
from ..models.transformer import HiARTransformer
from .noise import INITIAL, keyed_noise
from .shapes import check_prompt_embeds, require_kind


@torch.no_grad()
@own_settings()
def infill(
    model: HiARTransformer | Sequence[HiARTransformer],
    latents: Tensor,
    known: Tensor | Iterable[int],
    prompt_embeds: Tensor,
    schedule: FlowSchedule,
    *,
    frames_per_block: int = 3,
    sampler: str = "sde",
    seed: int = 0,
    video_ids: Sequence[int] | None = None,
    first_frame: int = 0,
    first_block: int = 0,
    first_block_frames: int | None = None,
    clean_context: bool = False,
    on_level: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Make the unknown frames of a clip; one forward of the whole clip per step.

    Args:
        model: one :class:`HiARTransformer`, or one for each step; one trained bidirectionally (a teacher) is best.
        latents: clean [B, F, C, H, W], whole blocks; the contents of unknown frames are ignored.
        known: bool [B, F], True where a frame is known; or the numbers of the known blocks, the same in every video.
        prompt_embeds: [B or 1, L, text_dim]. schedule: noise levels.
        sampler: "sde" re-noises at each step, "ode" follows the velocity (known frames keep their first noise).
        seed, video_ids: key of the noise, (seed, video, step, block) as in :class:`Rollout`; default videos 0..B-1.
        first_frame: absolute id of the first frame. first_block: number of the first block, for its noise.
        first_block_frames: its frames, if fewer than ``frames_per_block``.
        clean_context: the network sees known frames clean at every step, in place of at its own noise level.
        on_level: called with (step, x) before each step, x [B, F, C, H, W] at its noise level.

    Returns:
        [B, F, C, H, W] in the dtype of the weights; known frames are unchanged.

    Raises:
        ValueError: names the argument and its legal values. FloatingPointError: the step whose latents are not finite.
    """
    require_kind("schedule", schedule, FlowSchedule)
    models = [model] * len(schedule) if isinstance(model, HiARTransformer) else list(model)
    if len(models) != len(schedule):
        raise ValueError(f"model must be one network, or one for each of the {len(schedule)} steps, got {len(models)}")
    one_of("sampler", sampler, SAMPLERS)
    channels = models[0].config.in_channels
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents must be a tensor, got {type(latents).__name__}")
    if latents.dim() != 5 or latents.shape[2] != channels or 0 in latents.shape:
        raise ValueError(f"latents must be [B, F, {channels}, H, W], got {list(latents.shape)}")
    if not latents.is_floating_point():
        raise ValueError(f"latents must be of a floating dtype, got {latents.dtype}")
    batch, frames, block = latents.shape[0], latents.shape[1], frames_per_block
    short = block if first_block_frames is None else whole("first_block_frames", first_block_frames, 1, most=block)
    if block < 1 or frames < short or (frames - short) % block:
        behind = "" if short == block else f" behind the first {short}"
        raise ValueError(f"latents must be whole blocks of frames_per_block={block}{behind}, got {frames} frames")
    lengths = [short] + [block] * ((frames - short) // block)
    weight = models[0].patch_embedding.weight
    mask = _mask(known, batch, lengths).to(weight.device)[:, :, None, None, None]
    videos = list(range(batch)) if video_ids is None else list(video_ids)
    if len(videos) != batch:
        raise ValueError(f"video_ids must be one for each of {batch} videos, got {len(videos)}")
    check_prompt_embeds(prompt_embeds, batch, models[0].config)
    prompt_embeds = prompt_embeds.to(weight.device)

    def noise(step: int) -> Tensor:
        size = latents.shape[2:]
        shapes = [(first_block + n, (length, *size)) for n, length in enumerate(lengths)]
        drawn = [[keyed_noise(seed, video, step, n, shape) for n, shape in shapes] for video in videos]
        return torch.stack([torch.cat(blocks) for blocks in drawn]).to(weight.device, weight.dtype)

    clean = latents.to(weight.device, weight.dtype)
    own = initial = noise(INITIAL)
    x, wide = initial, torch.promote_types(weight.dtype, torch.float32)
    with cpu_threads(fitting_threads(*models)):
        for step, network in enumerate(models):
            sigma, next_sigma = schedule.sigmas[step], schedule.sigmas[step + 1]
            x = (clean if clean_context else _noised(clean, own, sigma)).where(mask, x)
            if on_level is not None:
                on_level(step, x)
            t = torch.full((batch, frames), TRAIN_TIMESTEPS * sigma, dtype=torch.float64, device=weight.device)
            if clean_context:
                t[mask[:, :, 0, 0, 0]] = 0.0
            velocity = network(x, t, prompt_embeds.expand(batch, -1, -1), "bidirectional", first_frame=first_frame)
            own = noise(step) if sampler == "sde" else initial
            now, then = (torch.full((1, 1), level, dtype=wide, device=weight.device) for level in (sigma, next_sigma))
            x = flow_step(x, velocity, now, then, own if sampler == "sde" else None)[1]
            if not bool(torch.isfinite(x).all()):
                raise FloatingPointError(f"latents are not finite from step {step} on")
    return clean.where(mask, x)


def _noised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Interpolate to noise level sigma in float32 or wider; rounded once."""
    wide = torch.promote_types(clean.dtype, torch.float32)
    return ((1 - sigma) * clean.to(wide) + sigma * noise.to(wide)).to(clean.dtype)


def _mask(known: Any, batch: int, lengths: Sequence[int]) -> Tensor:
    """bool [B, F], True where a frame is known; of numpy too. ``lengths``: frames of each block."""
    frames, blocks = sum(lengths), len(lengths)
    if hasattr(known, "dtype") and hasattr(known, "ndim"):
        is_list = known.ndim == 1 and "int" in str(known.dtype)
        known = known.tolist() if is_list else torch.as_tensor(known)
    if isinstance(known, Tensor):
        if known.shape != (batch, frames) or known.dtype != torch.bool:
            raise ValueError(f"known must be bool [{batch}, {frames}], got {known.dtype} {list(known.shape)}")
        return known
    if isinstance(known, str) or not hasattr(known, "__iter__"):
        raise ValueError(f"known must be numbers of blocks in 0..{blocks - 1}, or bool [B, F], got {one_line(known)}")
    mask = torch.zeros(batch, frames, dtype=torch.bool)
    for n in known:
        number = as_whole(n)
        if number is None or not 0 <= number < blocks:
            raise ValueError(f"known blocks must be in 0..{blocks - 1}, got {one_line(n)}")
        first = sum(lengths[:number])
        mask[:, first : first + lengths[number]] = True
    return mask
