"""Noise as a function of (seed, video, step, block): never of task order, rank, batch, device or machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.keyed import keyed_generator

INITIAL = -1  # the "step" of the initial noise
EXTERNAL = "given"  # in a state, in place of the noise scheme: the caller supplied the noise


@dataclass(frozen=True)
class KeyedNoise:
    """Noise of a batch of videos.

    seed        of the rollout
    videos      id of each video
    frames      block -> its frames [start, stop): :meth:`Plan.block_frames`
    shape       (C, H, W) of a latent frame
    """

    seed: int
    videos: Sequence[int]
    frames: Callable[[int], tuple[int, int]]
    shape: tuple[int, int, int]

    def __call__(self, step: int, block: int) -> Tensor:
        """float32 [B, F, C, H, W], on the CPU."""
        start, stop = self.frames(block)
        shape = (stop - start, *self.shape)
        return torch.stack([keyed_noise(self.seed, video, step, block, shape) for video in self.videos])


@dataclass(frozen=True)
class TensorNoise:
    """Initial noise from a tensor [B, frames after the prefix, C, H, W]."""

    noise: Tensor
    frames: Callable[[int], tuple[int, int]]
    prefix: int

    def __call__(self, step: int, block: int) -> Tensor:
        """The noise of a block, a view."""
        assert step == INITIAL
        start, stop = (frame - self.prefix for frame in self.frames(block))
        return self.noise[:, start:stop]


def keyed_noise(seed: int, video: int, step: int, block: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normals, float32 of ``shape`` (frames, C, H, W), drawn on the CPU; step -1 is the initial noise."""
    return keyed_generator(seed, "noise", video, step, block).normals(*shape)
