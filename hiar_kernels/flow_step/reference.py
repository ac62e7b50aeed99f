"""flow_step, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.torch_library import wide_dtype


def flow_step(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x0 = x - sigma v; next = (1 - sigma') x0 + sigma' noise, or x + (sigma' - sigma) v without noise."""
    wide = wide_dtype(x)
    s, n = (level.to(wide)[:, :, None, None, None] for level in (sigma, sigma_next))
    xw, v = x.to(wide), velocity.to(wide)
    x0 = xw - s * v
    following = xw + (n - s) * v if noise is None else (1 - n) * x0 + n * noise.to(wide)
    following = torch.where(n == 0, x0, following)  # the last step's output is x0 itself, to the bit
    return x0.to(x.dtype).contiguous(), following.to(x.dtype).contiguous()
