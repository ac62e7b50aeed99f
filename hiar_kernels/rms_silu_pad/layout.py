"""The memory format that the results follow."""

from __future__ import annotations

import torch
from torch import Tensor

CACHE_FRAMES = 2
"""Frames of the past that a causal convolution over three frames sees."""


def format_of(x: Tensor) -> torch.memory_format:
    """Channels-last where x [B, C, F, H, W] is dense in that order (and not in both), else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return torch.channels_last_3d if last else torch.contiguous_format
