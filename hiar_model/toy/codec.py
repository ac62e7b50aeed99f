"""Fixed linear codec between pixels and latents: principal components of square patches. Nothing is trained.

A patch of `patch` x `patch` pixels becomes `channels` x `split` x `split` numbers: its leading components, dealt out
over a small square of latents so that a transformer that joins `split` x `split` latents into one token gets the
patch back whole. split = 1 is the plain patch PCA. Frames are independent of each other.

Components are divided by their standard deviation, but not by less than `floor` times the largest: details keep up
with the noise of the diffusion, while components that hardly vary are not blown up to full noise of their own. Then one
common factor brings the root mean square of all latents to 1. So a larger floor lifts the leading
components, which carry colour and place, further above the noise: at floor 0.1, 0.25, 0.5 their standard deviation is
1.4, 2.1, 3.1 and that of the last of 64 is 0.44, 0.26, 0.19.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..common.settings import own_settings
from .world import ToyWorld, WorldConfig


class ToyCodec:
    """Frames [B, F, 3, H, W] in [-1, 1] <-> latents [B, F, channels, H / cell, W / cell], cell = patch / split pixels.

    basis [channels * split**2, 3 * patch**2] has orthonormal rows; mean [3 * patch**2]; scale [channels * split**2].
    All float32; they are the whole state.
    """

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor, *, patch: int, split: int) -> None:
        components, size = basis.shape
        if size != 3 * patch * patch or mean.shape != (size,) or scale.shape != (components,):
            raise ValueError(f"codec tensors do not fit a patch of {patch} pixels: basis {tuple(basis.shape)}")
        if patch % split or components % (split * split):
            raise ValueError(f"split {split} does not divide patch {patch} and {components} components")
        # Contiguous, because safetensors writes nothing else.
        self.mean, self.basis, self.scale = (x.float().contiguous() for x in (mean, basis, scale))
        self.patch, self.split = patch, split

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return len(self.basis) // self.split**2

    @property
    def cell(self) -> int:
        """Pixels per latent along each axis."""
        return self.patch // self.split

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, h, w) of a frame; ValueError if the frame is no whole number of patches."""
        if height % self.patch or width % self.patch:
            raise ValueError(f"frame size {height}x{width} must be a multiple of {self.patch} pixels")
        return self.channels, height // self.cell, width // self.cell

    @classmethod
    @own_settings()
    def fit(
        cls,
        world: WorldConfig | None = None,
        *,
        seed: int = 0,
        channels: int = 16,
        patch: int = 8,
        split: int = 2,
        frames: int = 4000,
        floor: float = 0.25,
    ) -> ToyCodec:
        """Codec for a world, from `frames` random frames of it; the same arguments give the same codec."""
        generator = torch.Generator().manual_seed(seed)  # of torch, for ever: old codecs are fitted again
        videos = ToyWorld(world).sample_batch(frames, 1, generator, start="anywhere").videos
        rows = _patches(videos, patch).flatten(0, -2).double()
        components = channels * split * split
        if components > rows.shape[1]:
            raise ValueError(f"{channels} channels are more than a patch of {patch} pixels has numbers")
        mean = rows.mean(0)
        rows -= mean
        covariance = rows.T @ rows / len(rows)
        values, vectors = torch.linalg.eigh(covariance)
        basis = vectors.flip(1)[:, :components].T
        # An eigenvector has no sign of its own: make its largest entry positive.
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        basis = basis * largest.sign()
        std = values.flip(0)[:components].clamp_min(0).sqrt()
        scale = std.clamp_min(floor * float(std[0]))
        scale = scale * (std / scale).square().mean().sqrt()
        return cls(mean, basis, scale, patch=patch, split=split)

    @own_settings()
    def for_size(self, world: WorldConfig) -> ToyCodec:
        """This codec for a world that shows the same in k times the pixels along each side, k = `world.scale`: patches
        k times as large, fitted to frames of that size, and latents that mean the same, so that a network trained on
        this codec's latents knows them at once. k = 1: this codec. ValueError if k is not whole.

        The components span the leading ones of the larger patches. Among all bases of that space it is the one whose
        components, averaged over k x k pixels, are nearest to this codec's (orthogonal Procrustes).
        """
        k = round(world.scale)
        if k != world.scale:
            sides = f"{world.height}x{world.width}"
            raise ValueError(f"the shorter side must be a multiple of {world.reference_side:g} pixels, got {sides}")
        if k == 1:
            return self
        plain = WorldConfig(height=world.height, width=world.width, edge=world.edge)
        larger = ToyCodec.fit(
            plain, channels=self.channels, patch=k * self.patch, split=self.split, frames=math.ceil(4000 / k**2)
        )
        pixels = larger.basis.unflatten(1, (3, larger.patch, larger.patch))
        averaged = torch.nn.functional.avg_pool2d(pixels, k).flatten(1).double()
        u, _, v = torch.linalg.svd(self.basis.double() @ averaged.T)
        basis = u @ v @ larger.basis.double()
        # A component of norm 1 over k * k as many pixels is k times fainter.
        return ToyCodec(larger.mean, basis, k * self.scale, patch=larger.patch, split=self.split)

    @own_settings()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, F, 3, H, W] in [-1, 1] -> latents float32 [B, F, C, h, w]."""
        if frames.ndim != 5 or frames.shape[2] != 3:
            raise ValueError(f"frames must be [B, F, 3, H, W], got {tuple(frames.shape)}")
        self.latent_shape(*frames.shape[3:])
        rows = _patches(frames.float(), self.patch)  # [B, F, H/p, W/p, 3 p p]
        parts = (rows - self.mean.to(rows.device)) @ (self.basis / self.scale[:, None]).T.to(rows.device)
        parts = parts.unflatten(-1, (self.channels, self.split, self.split))
        return parts.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

    @own_settings()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] -> frames float32 [B, F, 3, H, W], clamped to [-1, 1]."""
        fits = latents.ndim == 5 and latents.shape[2] == self.channels
        if not fits or latents.shape[3] % self.split or latents.shape[4] % self.split:
            raise ValueError(f"latents {tuple(latents.shape)} do not fit {self.channels} channels, split {self.split}")
        k, p = self.split, self.patch
        parts = latents.float().unflatten(4, (-1, k)).unflatten(3, (-1, k))  # [B, F, C, h/k, k, w/k, k]
        parts = parts.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
        rows = parts @ (self.basis * self.scale[:, None]).to(parts.device) + self.mean.to(parts.device)
        pixels = rows.unflatten(-1, (3, p, p)).permute(0, 1, 4, 2, 5, 3, 6)
        return pixels.flatten(5, 6).flatten(3, 4).clamp(-1, 1)

    @staticmethod
    def to_uint8(frames: Tensor) -> Tensor:
        """Frames [..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3]."""
        return ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)

    @own_settings()
    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `from_state` takes back; they travel in the weights file."""
        layout = torch.tensor([self.patch, self.split], dtype=torch.int64)
        return {"mean": self.mean, "basis": self.basis, "scale": self.scale, "layout": layout}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> ToyCodec:
        """Inverse of `state_dict`; ValueError names what is missing."""
        missing = [name for name in ("mean", "basis", "scale", "layout") if name not in state]
        if missing:
            raise ValueError(f"codec state lacks {', '.join(missing)}")
        patch, split = state["layout"].tolist()
        return cls(state["mean"], state["basis"], state["scale"], patch=patch, split=split)


def _patches(frames: Tensor, patch: int) -> Tensor:
    """[B, F, 3, H, W] -> [B, F, H/p, W/p, 3 p p], numbers of a patch in (channel, row, column) order."""
    blocks = frames.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [B, F, 3, H/p, p, W/p, p]
    return blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
