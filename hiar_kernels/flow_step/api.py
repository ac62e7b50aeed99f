"""Public flow_step."""

from __future__ import annotations

from torch import Tensor

from ..common.dispatch import check_floats, choose, require_no_gradient
from ..common.pointwise import automatic, prepare
from ..common.torch_library import OPS
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "triton")


def flow_step(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """One step of few-step flow matching (arXiv 2603.08703): the clean estimate and the next, less noisy latent.

    Args:
        x: noisy latents [B, F, C, H, W]. velocity: the network's v = eps - x0, same shape.
        sigma, sigma_next: noise levels [B or 1, F or 1] in 0..1; without a gradient.
        noise: standard normal, shape of x: "sde", next = (1 - sigma_next) x0 + sigma_next noise.
            None: "ode", next = x + (sigma_next - sigma) v.
        impl: "auto" | "reference" | "triton".

    Returns:
        x0 = x - sigma v and next, both [B, F, C, H, W] contiguous, in the dtype of x; computed in float32 (float64 for
        float64) and rounded once.

    Raises:
        ValueError: shapes do not fit, a noise level requires a gradient, or impl="triton" cannot take the device or a
            dtype.
    """
    check_floats("flow_step", x=x, velocity=velocity, sigma=sigma, sigma_next=sigma_next)
    if noise is not None:
        check_floats("flow_step", x=x, noise=noise)
    if x.dim() != 5:
        raise ValueError(f"flow_step: x must be [B, F, C, H, W], got {list(x.shape)}")
    for name, other in (("velocity", velocity), ("noise", noise)):
        ok = other is None or other.shape == x.shape
        if not ok:
            raise ValueError(
                f"flow_step: {name} must be {list(x.shape)}, got {[] if other is None else list(other.shape)}"
            )
    for name, level in (("sigma", sigma), ("sigma_next", sigma_next)):
        ok = level.dim() == 2 and level.shape[0] in (1, x.shape[0]) and level.shape[1] in (1, x.shape[1])
        if not ok:
            raise ValueError(
                f"flow_step: {name} must be [{x.shape[0]} or 1, {x.shape[1]} or 1], got {list(level.shape)}"
            )
    require_no_gradient("flow_step", "noise levels have no gradient; detach them", sigma, sigma_next)
    if choose("flow_step", impl, IMPLS, auto=automatic(x, velocity, noise)) == "triton":
        sigma, sigma_next = sigma.float(), sigma_next.float()
        prepare("flow_step", x=x, velocity=velocity, noise=noise, sigma=sigma, sigma_next=sigma_next)
        return OPS.flow_step(x, velocity, sigma, sigma_next, noise)
    return reference.flow_step(x, velocity, sigma, sigma_next, noise)
