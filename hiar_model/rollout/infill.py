"""Infilling: given blocks of a clip stay, the others are made to fit between them, in bidirectional mode.

All frames go through the network at once and see each other. At every noise level the given frames are noised anew to
that level, by the noise that an ordinary rollout of this seed has there; so the frames to be made see them as they see
each other, at their own level (matched noise), and from both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hiar_kernels import flow_step

from ..common.checks import as_whole
from ..common.settings import own_settings
from ..config import TRAIN_TIMESTEPS, FlowSchedule
from ..models.threads import cpu_threads, fitting_threads
from ..models.transformer import HiARTransformer
from .noise import INITIAL, keyed_noise
from .shapes import check_text


@torch.no_grad()
@own_settings()
def infill(
    model: HiARTransformer | Sequence[HiARTransformer],
    latents: Tensor,
    given: Tensor | Iterable[int],
    text: Tensor,
    schedule: FlowSchedule,
    *,
    frames_per_block: int = 3,
    trajectory: str = "sde",
    seed: int = 0,
    video_ids: Sequence[int] | None = None,
    first_frame: int = 0,
    on_level: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Make the frames of a clip that are not given; one forward of the whole clip a step.

    Args:
        model: one :class:`HiARTransformer`, or one for each step; a bidirectional one (a teacher) joins best.
        latents: clean [B, F, C, H, W], whole blocks; what stands in frames to be made is not looked at.
        given: True [B, F] where a frame is given; or the numbers of the blocks that are, the same in every video.
        text: prompt embedding [B or 1, L, text_dim]. schedule: noise levels.
        trajectory: "sde" re-noises at each step, "ode" follows the velocity (given frames keep their first noise).
        seed, video_ids: key of the noise, (seed, video, step, block) as in :class:`Rollout`; default videos 0..B-1.
        first_frame: absolute id of the first frame.
        on_level: called with (step, x) before each step, x [B, F, C, H, W] at its noise level.

    Returns:
        [B, F, C, H, W] in the dtype of the weights: given frames as they were, the others made.

    Raises:
        ValueError: names what does not fit. FloatingPointError: latents that are not finite, with the step.
    """
    models = [model] * len(schedule) if isinstance(model, HiARTransformer) else list(model)
    if len(models) != len(schedule):
        raise ValueError(f"model: give one, or one for each of the {len(schedule)} steps; got {len(models)}")
    if trajectory not in ("sde", "ode"):
        raise ValueError(f"trajectory must be one of sde, ode, got {trajectory!r}")
    channels = models[0].config.in_channels
    if latents.dim() != 5 or latents.shape[2] != channels:
        raise ValueError(f"latents must be [B, F, {channels}, H, W], got {list(latents.shape)}")
    batch, frames, block = latents.shape[0], latents.shape[1], frames_per_block
    if block < 1 or not frames or frames % block:
        raise ValueError(f"latents must be whole blocks of frames_per_block={block}, got {frames} frames")
    weight = models[0].patch_embedding.weight
    known = _given(given, batch, frames, block).to(weight.device)
    videos = list(range(batch)) if video_ids is None else list(video_ids)
    if len(videos) != batch:
        raise ValueError(f"video_ids must be one for each of {batch} videos, got {len(videos)}")
    check_text(text, batch, models[0].config)
    text = text.to(weight.device)

    def noise(step: int) -> Tensor:
        shape = (block, *latents.shape[2:])
        drawn = [[keyed_noise(seed, video, step, n, shape) for n in range(frames // block)] for video in videos]
        return torch.stack([torch.cat(blocks) for blocks in drawn]).to(weight.device, weight.dtype)

    mask = known[:, :, None, None, None]
    clean = latents.to(weight.device, weight.dtype).where(mask, 0.0)  # even NaN may stand where nothing is given
    own = initial = noise(INITIAL)
    x, wide = initial, torch.promote_types(weight.dtype, torch.float32)
    with cpu_threads(fitting_threads(*models)):
        for step, network in enumerate(models):
            sigma, following = schedule.sigmas[step], schedule.sigmas[step + 1]
            x = _noised(clean, own, sigma).where(mask, x)
            if on_level is not None:
                on_level(step, x)
            t = torch.full((batch, frames), TRAIN_TIMESTEPS * sigma, dtype=torch.float64, device=weight.device)
            velocity = network(x, t, text.expand(batch, -1, -1), "bidirectional", first_frame=first_frame)
            own = noise(step) if trajectory == "sde" else initial
            now, then = (torch.full((1, 1), level, dtype=wide, device=weight.device) for level in (sigma, following))
            x = flow_step(x, velocity, now, then, own if trajectory == "sde" else None)[1]
            if not bool(torch.isfinite(x).all()):
                raise FloatingPointError(f"latents are not finite from step {step} on")
    return clean.where(mask, x)


def _noised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """At noise level sigma; rounded once."""
    wide = torch.promote_types(clean.dtype, torch.float32)
    return ((1 - sigma) * clean.to(wide) + sigma * noise.to(wide)).to(clean.dtype)


def _given(given: Tensor | Iterable[int], batch: int, frames: int, block: int) -> Tensor:
    """True [B, F] where a frame is given."""
    if isinstance(given, Tensor):
        if given.shape != (batch, frames) or given.dtype != torch.bool:
            raise ValueError(f"given must be bool [{batch}, {frames}], got {given.dtype} {list(given.shape)}")
        return given
    known, blocks = torch.zeros(batch, frames, dtype=torch.bool), frames // block
    for n in given:
        number = as_whole(n)
        if number is None or not 0 <= number < blocks:
            raise ValueError(f"given blocks must be in 0..{blocks - 1}, got {n!r}")
        known[:, number * block : (number + 1) * block] = True
    return known
