"""Reads the background of a frame: its colour, grating and light, fitted to the pixels around the shape.

Robust least squares, each frame by itself, so that a video whose background has drifted is read as it is now: pixels
near the median colour are fitted by a flat colour and the waves of the world; what lies far from the fit (the
shape) is left out, and the fit is made again with a closer limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.settings import own_settings
from .world import LIGHT_WAVES, WAVES, ToyWorld

LIMITS = (0.25, 0.2, 0.12, 0.08)
"""Largest distance of a pixel from the fit before, [0, 1] RGB, for it to take part: at first twice the strongest
texture, or light, beside what a large shape moves the median by, at last a third of the least contrast of a shape."""
FRAMES_BEFORE = 3
"""A video's own beginning, with which its later backgrounds are compared."""
FAINT = 0.01
"""A video whose beginning has a texture of a smaller amplitude than this has none that it could keep."""


@dataclass(frozen=True)
class Backdrop:
    """Backgrounds of F frames; float32, [0, 1] RGB, NaN where a frame is not finite."""

    colour: Tensor  # [F, 3], without texture and light
    waves: Tensor  # [F, gratings, 2], amplitudes of cosine and sine; no gratings in a world without texture
    light: Tensor  # [F, directions, 2], likewise of the light

    @property
    @own_settings()
    def amplitude(self) -> Tensor:
        """Of the texture, [F]: root of the summed squares over the gratings."""
        return self.waves.flatten(1).norm(dim=1)

    def colour_change(self) -> Tensor:
        """Root mean square over the channels of the difference from the video's beginning, [F]."""
        return (self.colour - self.colour[:FRAMES_BEFORE].nanmean(0)).square().mean(1).sqrt()

    def texture_ratio(self) -> Tensor:
        """Amplitude over that of the beginning, [F]: 1 at the same contrast, whatever the pattern; NaN if the beginning
        has no texture."""
        return self.amplitude / _before(self.waves).norm()

    def texture_kept(self) -> Tensor:
        """How much of the beginning's texture is there, [F]: 1 for the same pattern at the same contrast, 0 for another
        pattern or none, 0.5 at half the contrast, -1 for the negative; NaN if the beginning has no texture."""
        return _share_left(self.waves)

    def light_kept(self) -> Tensor:
        """How much of the beginning's light is there, [F]; see `texture_kept`."""
        return _share_left(self.light)


def _share_left(waves: Tensor) -> Tensor:
    before = _before(waves)
    return waves.flatten(1) @ before / before.square().sum()


def _before(waves: Tensor) -> Tensor:
    before = waves[:FRAMES_BEFORE].nanmean(0).flatten()
    return before if before.norm() >= FAINT else torch.full_like(before, math.nan)


class BackdropReader:
    """Fits the backgrounds of one world."""

    @own_settings()
    def __init__(self, world: ToyWorld) -> None:
        self.size = (world.config.height, world.config.width)
        self.gratings = len(WAVES) if world.config.texture else 0
        waves = WAVES[: self.gratings] + (LIGHT_WAVES if world.config.light else ())
        columns = [torch.ones(1, *self.size)]
        if waves:
            angles = world.wave_angles(waves)
            columns += [torch.stack([angles.cos(), angles.sin()], dim=1).flatten(0, 1)]
        self.design = torch.cat(columns).flatten(1).T.contiguous()  # [pixels, 1 + 2 waves]
        self.products = (self.design[:, :, None] * self.design[:, None, :]).flatten(1)

    @own_settings()
    def read(self, rgb: Tensor) -> tuple[Backdrop, Tensor]:
        """Of frames float32 [F, H, W, 3] in [0, 1]: what was read, and as an image [F, H, W, 3]."""
        pixels = rgb.flatten(1, 2)  # [F, pixels, 3]
        finite = pixels.isfinite().flatten(1).all(1)
        pixels = pixels.nan_to_num()
        # Texture and light are the same in all channels: they and the mean over the channels are one fit, each
        # channel's deviation from that mean is flat.
        grey = pixels.mean(2)
        tint = pixels - grey[:, :, None]
        image = pixels.median(1, keepdim=True).values
        count = self.design.shape[1]
        for limit in LIMITS:
            weight = ((pixels - image).square().sum(2) < limit * limit).float()
            normal = (weight @ self.products).unflatten(1, (count, count))
            # The ridge matters only where next to no pixel takes part.
            normal = normal + 1e-3 * torch.eye(count)
            fit = torch.linalg.solve(normal, (weight * grey) @ self.design)
            own = (weight[:, None] @ tint)[:, 0] / weight.sum(1, keepdim=True).clamp_min(1)
            image = (fit @ self.design.T)[:, :, None] + own[:, None]
        colour = torch.where(finite[:, None], fit[:, :1] + own, math.nan)
        waves = torch.where(finite[:, None], fit[:, 1:], math.nan).reshape(len(fit), count // 2, 2)
        return Backdrop(colour, waves[:, : self.gratings], waves[:, self.gratings :]), image.unflatten(1, self.size)
