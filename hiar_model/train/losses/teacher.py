"""The bidirectional teacher: flow matching on whole clips, and its ODE trajectories under guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...common.keyed import keyed_generator
from ...config import TRAIN_TIMESTEPS, sigma_table
from .noise import add_noise, shift_tensor


class Network(Protocol):
    """A velocity network, such as :class:`hiar_model.HiARTransformer`."""

    def __call__(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, /, attention: str) -> Tensor:
        """latents [B, F, C, H, W], timesteps [B, F], prompt_embeds [B, L, text_dim] -> velocity like the latents."""


class FlowDraws(NamedTuple):
    """The random numbers of an update of flow matching."""

    sigma: Tensor  # float32 [b] in (0, 1]
    noise: Tensor  # float32 [b, F, C, H, W]
    dropped: Tensor  # bool [b]: the prompt is replaced by the empty one


def flow_draws(
    seed: int,
    stage: str,
    update: int,
    samples: Sequence[int],
    latent_shape: Sequence[int],
    *,
    shift: float = 1.0,
    text_dropout: float = 0.1,
) -> FlowDraws:
    """Levels uniform over (0, 1], then shifted; standard normal noise; prompts to drop. Each sample has its own key.

    Args:
        latent_shape: (F, C, H, W). shift: of the levels. text_dropout: share of samples without their prompt, so that
            the teacher learns the unconditional velocity that guidance needs.

    Raises:
        ValueError: a share outside of 0..1, a shift that is not positive.
    """
    if not 0 <= text_dropout <= 1:
        raise ValueError(f"text_dropout must be in 0..1, got {text_dropout}")
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    generators = [keyed_generator(seed, stage, update, sample, "flow") for sample in samples]
    level, drop = torch.stack([g.uniform(2) for g in generators], 1)
    noise = torch.stack([g.normals(*latent_shape) for g in generators])
    return FlowDraws(shift_tensor(1 - level, shift), noise, drop < text_dropout)


def drop_prompts(prompt_embeds: Tensor, unconditional: Tensor, dropped: Tensor) -> Tensor:
    """prompt_embeds [B, L, text_dim] with ``unconditional`` [1, L, text_dim] where ``dropped`` [B] is True."""
    return torch.where(dropped.to(prompt_embeds.device)[:, None, None], unconditional.to(prompt_embeds), prompt_embeds)


def flow_matching_loss(
    model: Network, x0: Tensor, prompt_embeds: Tensor, sigma: Tensor, noise: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Mean squared error of the velocity noise - x0 at (1 - sigma) x0 + sigma noise, all frames seeing all frames.

    Args:
        x0, noise: [B, F, C, H, W]. prompt_embeds: [B, L, text_dim]. sigma: [B], one level for a clip.
        weight: [B, F], 0 leaves a frame out; default all 1.

    Returns:
        Scalar in float32, or float64 if the latents are.

    Raises:
        ValueError: shapes that do not fit, weights that are all 0.
    """
    batch, frames = x0.shape[:2]
    legal = {"noise": x0.shape, "sigma": (batch,), "weight": (batch, frames)}
    for name, tensor in (("noise", noise), ("sigma", sigma), ("weight", weight)):
        if tensor is not None and tensor.shape != legal[name]:
            raise ValueError(f"flow_matching_loss: {name} must be {list(legal[name])}, got {list(tensor.shape)}")
    timesteps = (TRAIN_TIMESTEPS * sigma.double())[:, None].expand(-1, frames)
    velocity = model(add_noise(x0, sigma, noise), timesteps, prompt_embeds, attention="bidirectional")
    wide = torch.promote_types(x0.dtype, torch.float32)
    error = (velocity.to(wide) - (noise - x0).to(wide)).square().mean(dim=(2, 3, 4))
    if weight is None:
        return error.mean()
    total = weight.sum()
    if not total > 0:
        raise ValueError("flow_matching_loss: weight must not be 0 for all frames")
    return (error * weight).sum() / total


class OdePlan(NamedTuple):
    """Which states of an ODE are its points."""

    sigmas: tuple[float, ...]  # of all steps + 1 states, the last one 0
    points: tuple[int, ...]  # rising indices of states

    @property
    def point_sigmas(self) -> tuple[float, ...]:
        """Noise levels of the points [P]."""
        return tuple(self.sigmas[i] for i in self.points)


def ode_plan(steps: int = 48, shift: float = 8.0, points: Sequence[int] = (0, 12, 24, 36, -1)) -> OdePlan:
    """The levels of a teacher's ODE: state 0 is pure noise, state ``steps`` (also -1) the clean sample.

    Raises:
        ValueError: no step, points that do not rise or lie outside.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"an ODE needs at least 1 step and a positive shift, got {steps} steps, shift {shift}")
    states = tuple(p + steps + 1 if p < 0 else p for p in points)
    inside = all(0 <= p <= steps for p in states)
    if len(states) < 2 or not inside or list(states) != sorted(set(states)):
        raise ValueError(f"points must be at least two, rising within 0..{steps} (-1: the last), got {list(points)}")
    return OdePlan((*sigma_table(steps, shift), 0.0), states)


@torch.no_grad()
def ode_trajectory(
    teacher: Network,
    noise: Tensor,
    prompt_embeds: Tensor,
    unconditional: Tensor,
    *,
    steps: int = 48,
    shift: float = 8.0,
    guidance: float = 6.0,
    points: Sequence[int] = (0, 12, 24, 36, -1),
) -> Tensor:
    """Euler steps from noise to a clean sample under classifier-free guidance; returns some of the states.

    The velocity is uncond + guidance (cond - uncond), both from one batch of 2 B samples (guidance 1: B, cond alone).
    States are float32 whatever the weights are: a chord between two of them divides by small differences of sigma.

    Args:
        noise: [B, F, C, H, W]. prompt_embeds: [B, L, text_dim]. unconditional: [1 or B, L, text_dim].
        steps, shift: of the noise levels. points: states to return, 0 noise, -1 clean (:func:`ode_plan`).

    Returns:
        [B, P, F, C, H, W] float32, at the levels ``ode_plan(steps, shift, points).point_sigmas``.
    """
    plan = ode_plan(steps, shift, points)
    batch, frames = noise.shape[:2]
    x = noise.float()
    guided = guidance != 1
    if guided:
        prompt_embeds = torch.cat([prompt_embeds, unconditional.to(prompt_embeds).expand(batch, -1, -1)])
    states = [x] if plan.points[0] == 0 else []
    for step, (sigma, following) in enumerate(zip(plan.sigmas[:-1], plan.sigmas[1:], strict=True)):
        if len(states) == len(plan.points):
            break
        shape = len(prompt_embeds), frames
        timesteps = torch.full(shape, TRAIN_TIMESTEPS * sigma, dtype=torch.float64, device=x.device)
        latents = torch.cat([x, x]) if guided else x
        velocity = teacher(latents, timesteps, prompt_embeds, attention="bidirectional").float()
        if guided:
            conditional, free = velocity.chunk(2)
            velocity = free + guidance * (conditional - free)
        x = x + (following - sigma) * velocity
        if step + 1 in plan.points:
            states.append(x)
    return torch.stack(states, 1)
