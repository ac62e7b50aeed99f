"""Weights in the layout of taew2_1, by the formula of tests/data/taehv.safetensors: see tests/data/README.md."""

from __future__ import annotations

import functools
import zlib

import numpy as np
import torch
from torch import Tensor

from hiar_model.models.small_vae import SmallVAE


def by_formula(key: str, shape: tuple[int, ...]) -> Tensor:
    """float32; uniform, with a deviation that keeps features of the same size from layer to layer."""
    count = int(np.prod(shape))
    scale = 0.65 * np.sqrt(2 / (count / shape[0])) if len(shape) > 1 else 0.05
    u = np.sin(12.9898 * np.arange(count, dtype=np.float64) + zlib.crc32(key.encode()) % 9973) * 43758.5453
    return torch.from_numpy(((2 * (u - np.floor(u)) - 1) * np.sqrt(3) * scale).astype(np.float32).reshape(shape))


@functools.cache
def taehv_state() -> dict[str, Tensor]:
    """Published keys -> tensors."""
    with torch.device("meta"):
        shapes = {key: tuple(x.shape) for key, x in SmallVAE().state_dict().items()}
    return {key: by_formula(key, shape) for key, shape in shapes.items()}
