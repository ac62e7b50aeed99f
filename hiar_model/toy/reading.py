"""What the oracle read from a video, compared with its prompt; and means over several videos."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..common.settings import own_settings
from .prompt import COLOURS, SHAPES, SIZES, ToyPrompt

NOTHING = -1
"""Colour, shape or size of a frame in which none can be read."""
OVERLAP_LIMIT = 0.75
DIRECTION_LIMIT = 22.5
"""Degrees; half the angle between neighbouring directions."""
MOVING_LIMIT = 0.25
"""A clip below this share of the prompted speed has no direction."""


@dataclass(frozen=True)
class Reading:
    """What the oracle read from F frames, and how it compares with the prompt. Tensors [F]; indices into the word lists
    of `prompt`, or `NOTHING`. `part` gives the reading of a stretch of frames."""

    prompt: ToyPrompt
    colour: Tensor  # int64
    shape: Tensor  # int64, best over shapes and sizes
    size: Tensor  # int64
    overlap: Tensor  # float32, intersection over union with the prompted shape and size at its best position
    centres: Tensor  # float64 [F, 2] (x, y) on the torus, pixels; NaN where there is no foreground
    extent: Tensor  # float64 [2], (x, y) size of the torus
    velocity_expected: Tensor  # float64 [2] (x, y), pixels per frame; at the mean speed where no prompt tells it
    background: Tensor  # float32 [F, 3], colour behind the shape without texture and light, [0, 1] RGB
    background_change: Tensor  # float32 [F], root mean square from that of the video's beginning, [0, 1] RGB
    texture: Tensor  # float32 [F, gratings, 2], amplitudes of cosine and sine, [0, 1] RGB
    texture_ratio: Tensor  # float32 [F], amplitude over that of the video's beginning; NaN without texture there
    texture_kept: Tensor  # float32 [F], share of the beginning's texture that is there; see `backdrop`
    light: Tensor  # float32 [F, directions, 2], as the texture
    light_kept: Tensor  # float32 [F], as that of the texture
    saturation: Tensor  # float32 [F], share of pixel values at an end of [0, 1]

    @property
    def colour_right(self) -> Tensor:
        """bool [F]."""
        return self.colour == COLOURS.index(self.prompt.colour)

    @property
    def shape_right(self) -> Tensor:
        """bool [F]."""
        return self.shape == SHAPES.index(self.prompt.shape)

    @property
    def size_right(self) -> Tensor:
        """bool [F]."""
        return self.size == SIZES.index(self.prompt.size)

    @property
    def valid(self) -> Tensor:
        """bool [F]: colour and shape right and overlap above `OVERLAP_LIMIT`."""
        return self.colour_right & self.shape_right & (self.overlap > OVERLAP_LIMIT)

    @property
    @own_settings()
    def velocity(self) -> Tensor:
        """float64 [2] (x, y), pixels per frame: least squares over the unwrapped path, which a jump between two blocks
        does not fool as it fools a median; NaN with fewer than two frames that show anything."""
        seen = self.centres.isfinite().all(1).nonzero()[:, 0]
        if len(seen) < 2:
            return torch.full((2,), math.nan, dtype=torch.float64)
        steps = self.centres[seen].diff(dim=0)
        steps = (steps + self.extent / 2) % self.extent - self.extent / 2
        path = torch.cat([torch.zeros(1, 2, dtype=torch.float64), steps.cumsum(0)])
        time = seen.double() - seen.double().mean()
        return time @ path / time.square().sum()

    @property
    @own_settings()
    def speed_ratio(self) -> float:
        """Speed over the prompted speed; NaN if nothing was seen."""
        return float(self.velocity.norm() / self.velocity_expected.norm())

    @property
    @own_settings()
    def direction_error(self) -> float:
        """Degrees in [0, 180] between the fitted and the prompted direction; NaN if nothing was seen."""
        (x, y), (want_x, want_y) = self.velocity.tolist(), self.velocity_expected.tolist()
        return abs(math.degrees(math.atan2(want_x * y - want_y * x, want_x * x + want_y * y)))

    @property
    def direction_right(self) -> bool:
        """Within `DIRECTION_LIMIT` of the prompt, and moving at all."""
        return self.direction_error < DIRECTION_LIMIT and self.speed_ratio > MOVING_LIMIT

    def __len__(self) -> int:
        return len(self.colour)

    def part(self, first: int, last: int) -> Reading:
        """The reading of frames [first, last)."""
        return replace(self, **{name: getattr(self, name)[first:last] for name in _PER_FRAME})

    def parts(self, count: int = 6) -> list[Reading]:
        """The clip cut into `count` stretches of nearly equal length; ValueError if it has fewer frames than that."""
        if not 1 <= count <= len(self):
            raise ValueError(f"cannot cut {len(self)} frames into {count} parts")
        cuts = [len(self) * i // count for i in range(count + 1)]
        return [self.part(first, last) for first, last in itertools.pairwise(cuts)]


_PER_FRAME = (
    "colour", "shape", "size", "overlap", "centres", "background", "background_change", "texture", "texture_ratio",
    "texture_kept", "light", "light_kept", "saturation",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Means over several readings: over frames, except direction and speed, which count clips. What compares with a
    video's beginning is NaN in a world without it."""

    colour: float
    shape: float
    valid: float
    overlap: float
    direction: float
    speed_ratio: float  # over clips in which anything was seen
    background_change: float
    texture_ratio: float
    texture_kept: float
    light_kept: float
    saturation: float

    @staticmethod
    @own_settings()
    def of(readings: Sequence[Reading]) -> Summary:
        """ValueError if there is no reading."""
        if not readings:
            raise ValueError("nothing to summarise")
        ratios = torch.tensor([reading.speed_ratio for reading in readings])
        return Summary(
            colour=_share([reading.colour_right for reading in readings]),
            shape=_share([reading.shape_right for reading in readings]),
            valid=_share([reading.valid for reading in readings]),
            overlap=_share([reading.overlap for reading in readings]),
            direction=sum(reading.direction_right for reading in readings) / len(readings),
            speed_ratio=float(ratios.nanmean()),
            background_change=_mean([reading.background_change for reading in readings]),
            texture_ratio=_mean([reading.texture_ratio for reading in readings]),
            texture_kept=_mean([reading.texture_kept for reading in readings]),
            light_kept=_mean([reading.light_kept for reading in readings]),
            saturation=_mean([reading.saturation for reading in readings]),
        )


def _share(rows: list[Tensor]) -> float:
    return float(torch.cat(rows).double().mean())


def _mean(rows: list[Tensor]) -> float:
    """Over the frames in which it could be measured."""
    return float(torch.cat(rows).double().nanmean())
