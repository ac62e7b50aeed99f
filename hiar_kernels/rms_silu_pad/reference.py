"""rms_silu_pad, eager."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.torch_library import wide_dtype
from .layout import CACHE_FRAMES, format_of


def rms_silu_pad(x: Tensor, weight: Tensor, cache: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """silu(x / max(|x|, eps) sqrt(C) weight) behind the two frames before it; and the last two frames of that."""
    wide, memory = wide_dtype(x), format_of(x)
    normed = F.normalize(x.to(wide), dim=1, eps=eps) * x.shape[1] ** 0.5 * weight.to(wide)[:, None, None, None]
    past = x.new_zeros(0) if cache is None else cache.to(x.dtype)
    frames = [F.silu(normed).to(x.dtype)] if cache is None else [past, F.silu(normed).to(x.dtype)]
    missing = CACHE_FRAMES - (0 if cache is None else cache.shape[2])
    out = F.pad(torch.cat(frames, dim=2), (0, 0, 0, 0, missing, 0))
    return out.clone(memory_format=memory), out[:, :, -CACHE_FRAMES:].clone(memory_format=memory)
