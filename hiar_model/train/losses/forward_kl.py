"""Forward KL (arXiv 2603.08703): a few-step student regresses the teacher's own trajectories, which keeps its motion.

Between two points of an ODE trajectory the teacher moves along a chord; prolonged to noise level 0 it gives the x0 that
a single step of the student should predict at the first point. The student runs in bidirectional-attention mode: the
teacher's trajectories are bidirectional, and need no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.keyed import Generator, draw_whole
from ...config import TRAIN_TIMESTEPS
from ...models.self_attention import ATTENTION_MODES
from ...models.transformer import HiARTransformer


def trajectory_x0(point: Tensor, next_point: Tensor, sigma: float | Tensor, next_sigma: float | Tensor) -> Tensor:
    """x0 target of the forward KL: point - sigma (next_point - point) / (next_sigma - sigma), float32 or wider.

    Args:
        point, next_point: of one trajectory, [B, F, C, H, W]. sigma, next_sigma: their noise levels, numbers or [B].

    Raises:
        ValueError: shapes differ; sigma and next_sigma are equal, or not two numbers or B each.

    Example:
        >>> import torch
        >>> from hiar_model.train import trajectory_x0
        >>> point = torch.ones(1, 3, 2, 4, 4)
        >>> float(trajectory_x0(point, 0.75 * point, 1.0, 0.5).mean())
        0.5
    """
    if point.shape != next_point.shape:
        raise ValueError(
            f"trajectory_x0: next_point must be {list(point.shape)} like point, got {list(next_point.shape)}"
        )
    here, there = (torch.as_tensor(s, dtype=torch.float64, device="cpu").reshape(-1) for s in (sigma, next_sigma))
    batch = len(point)
    if len(here) not in (1, batch) or here.shape != there.shape or bool((here == there).any()):
        raise ValueError(
            f"trajectory_x0: sigma and next_sigma must be two different numbers, or {batch} each, "
            f"got {here.tolist()} and {there.tolist()}"
        )
    wide = torch.promote_types(point.dtype, torch.float32)
    x, y = point.to(wide), next_point.to(wide)
    ratio = (here / (there - here)).to(x.device, wide)  # in float64: between close points it is large
    return x - ratio.view(-1, *[1] * (x.dim() - 1)) * (y - x)


def draw_points(batch: int, first_k: int, generator: Generator) -> Tensor:
    """The point of each video: [batch] int64, uniform over the first ``first_k``."""
    return draw_whole(generator, first_k, batch)


def forward_kl_loss(
    student: HiARTransformer,
    trajectory: Tensor,
    sigmas: Sequence[float] | Tensor,
    prompt_embeds: Tensor,
    *,
    index: Tensor | None = None,
    first_k: int = 1,
    generator: Generator | None = None,
    attention: str = "bidirectional",
    **mask: Any,
) -> Tensor:
    """mse of the student's x0 at a point of the teacher's trajectory and the x0 of the chord to the next one.

    Args:
        trajectory: the teacher's points, [B, P, F, C, H, W]. sigmas: their noise levels [P], falling.
        prompt_embeds: [B, L, text_dim].
        index: [B], the point of each video, each below ``first_k``; None: 0 if first_k = 1, else drawn from
            ``generator``.
        first_k: how many of the first points are used, 1 to P - 1.
        attention: "bidirectional", or "block_causal" with the ``mask`` (:func:`.context.block_causal`).

    Raises:
        ValueError: a shape, number or name does not fit, with the legal ones.
    """
    if trajectory.dim() != 6 or trajectory.shape[1] < 2:
        raise ValueError(f"forward_kl_loss: trajectory must be [B, P >= 2, F, C, H, W], got {list(trajectory.shape)}")
    batch, points = trajectory.shape[:2]
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if levels.shape != (points,) or not bool((levels.diff() < 0).all()):
        raise ValueError(f"forward_kl_loss: sigmas must be {points} falling numbers, got {levels.tolist()}")
    if not 1 <= first_k < points:
        raise ValueError(f"forward_kl_loss: first_k must be 1 to {points - 1}, got {first_k}")
    if attention not in ATTENTION_MODES:
        raise ValueError(f"forward_kl_loss: attention must be one of {', '.join(ATTENTION_MODES)}, got {attention!r}")
    if index is None:
        if first_k > 1 and generator is None:
            raise ValueError(f"forward_kl_loss: first_k={first_k} needs an index for each video, or a generator")
        index = torch.zeros(batch, dtype=torch.int64) if generator is None else draw_points(batch, first_k, generator)
    index = index.cpu()
    if index.shape != (batch,) or not bool(((index >= 0) & (index < first_k)).all()):
        raise ValueError(f"forward_kl_loss: index must be {batch} numbers in 0..{first_k - 1}, got {index.tolist()}")
    each = torch.arange(batch)
    point, next_point = trajectory[each, index], trajectory[each, index + 1]
    sigma, next_sigma = levels[index], levels[index + 1]
    target = trajectory_x0(point, next_point, sigma, next_sigma)
    velocity = student(point, (TRAIN_TIMESTEPS * sigma).to(point.device), prompt_embeds, attention, **mask)
    scale = sigma.to(target.device, target.dtype).view(-1, 1, 1, 1, 1)
    return (point.to(target.dtype) - scale * velocity.to(target.dtype) - target).square().mean()
