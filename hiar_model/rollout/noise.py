"""Noise as a function of (seed, video, step, block): never of visiting order, rank, batch or device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

INITIAL = -1  # the "step" of the initial noise


def keyed_noise(seed: int, video: int, step: int, block: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normals float32 of ``shape`` (frames, C, H, W), drawn on the CPU; step -1 is the initial noise."""
    key = f"{seed}/{video}/{step}/{block}".encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))
