"""Reads colour, shape, size, position and motion back from pixels, and says what of a prompt a video kept.

Per frame: every pixel is explained as a mixture of background and one legal colour; the colour that leaves the least
unexplained is read, and the mixing weight is the foreground. The foreground is compared with templates of every
shape and size, each at its best position. Per clip: one straight line is fitted to the unwrapped path.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .prompt import COLOURS, SHAPES, SIZES, ToyPrompt, parse
from .world import ToyWorld, WorldConfig

NOTHING = -1
"""Colour, shape or size of a frame in which none can be read."""
OVERLAP_LIMIT = 0.75
DIRECTION_LIMIT = 22.5
"""Degrees; half the angle between neighbouring directions."""
CORE_LIMIT = 0.25
"""A frame has a colour if more than this share of its foreground pixels is hardly mixed with background; the smallest
plus has 0.44."""
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
    velocity_wanted: Tensor  # float64 [2] (x, y), pixels per frame

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
    def speed_ratio(self) -> float:
        """Speed over the prompted speed; NaN if nothing was seen."""
        return float(self.velocity.norm() / self.velocity_wanted.norm())

    @property
    def direction_error(self) -> float:
        """Degrees in [0, 180] between the fitted and the prompted direction; NaN if nothing was seen."""
        (x, y), (want_x, want_y) = self.velocity.tolist(), self.velocity_wanted.tolist()
        return abs(math.degrees(math.atan2(want_x * y - want_y * x, want_x * x + want_y * y)))

    @property
    def direction_right(self) -> bool:
        """Within `DIRECTION_LIMIT` of the prompt, and moving at all."""
        return self.direction_error < DIRECTION_LIMIT and self.speed_ratio > MOVING_LIMIT

    def __len__(self) -> int:
        return len(self.colour)

    def part(self, first: int, last: int) -> Reading:
        """The reading of frames [first, last)."""
        names = ("colour", "shape", "size", "overlap", "centres")
        return replace(self, **{name: getattr(self, name)[first:last] for name in names})

    def parts(self, count: int = 6) -> list[Reading]:
        """The clip cut into `count` stretches of nearly equal length; ValueError if it has fewer frames than that."""
        if not 1 <= count <= len(self):
            raise ValueError(f"cannot cut {len(self)} frames into {count} parts")
        cuts = [len(self) * i // count for i in range(count + 1)]
        return [self.part(first, last) for first, last in itertools.pairwise(cuts)]


@dataclass(frozen=True)
class Summary:
    """Means over several readings: shares of frames, except the direction, which counts clips."""

    colour: float
    shape: float
    valid: float
    overlap: float
    direction: float
    speed_ratio: float  # over clips in which anything was seen

    @staticmethod
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
        )


def _share(rows: list[Tensor]) -> float:
    return float(torch.cat(rows).double().mean())


class ToyOracle:
    """Reads videos of the world of one `WorldConfig`. Building it renders the templates (some 0.1 s): keep it."""

    def __init__(self, config: WorldConfig | None = None, *, reach: float = 1.5, step: float = 0.25) -> None:
        """Templates are tried up to `reach` around the first guess of the position, `step` apart; reference pixels."""
        self.world = ToyWorld(config)
        self.config = self.world.config
        self.contrast = self.world.palette - self.world.background  # [colours, 3]
        # Half the smallest distance: nearer to one colour than this is nearer than to every other.
        self.colour_limit = float(torch.pdist(self.world.palette).min()) / 2
        self.middle = torch.tensor([self.config.width // 2, self.config.height // 2])  # (x, y), a pixel corner
        count = round(2 * reach / step) + 1
        offsets = torch.linspace(-reach, reach, count, dtype=torch.float64) * self.config.scale
        grid = torch.cartesian_prod(offsets, offsets) + self.middle  # [positions, 2]
        kinds = [
            self.world.coverage(shape, radius.expand(len(grid)), grid)
            for shape in range(len(SHAPES))
            for radius in self.world.radii
        ]
        self.templates = _stretch(torch.stack(kinds))  # [shapes * sizes, positions, H, W]
        self.energies = self.templates.square().sum((2, 3))
        y = torch.arange(self.config.height)[:, None] + 0.5 - self.middle[1]
        x = torch.arange(self.config.width)[None] + 0.5 - self.middle[0]
        self.x, self.y = x.double(), y.double()
        square = x.square() + y.square()
        width = 3.0 * self.config.scale  # narrower than a shape, so that it finds one of two rather than the gap
        self.finder = torch.fft.rfft2(torch.exp(-square / (2 * width * width))).conj()
        # Farther away than any shape reaches is another thing.
        self.near = (square.sqrt() < 1.6 * self.world.radii.max() + self.config.edge).double()

    def evaluate(self, frames: Tensor, prompt: str | ToyPrompt) -> Reading:
        """Reads a video: uint8 [F, H, W, 3], or float [F, 3, H, W] in [-1, 1]; whole multiples of the world's frame
        size are averaged down first. ValueError for another shape, or a prompt outside the grammar."""
        prompt = parse(prompt) if isinstance(prompt, str) else prompt
        rgb = self._pixels(frames)
        colour, foreground = self._read_colour(rgb)
        seen = foreground.flatten(1).sum(1) > 0.5  # pixels
        rolled, corner = self._roll_to_middle(foreground)
        overlaps = self._overlaps(rolled)
        best = overlaps.argmax(1)
        wanted = SHAPES.index(prompt.shape) * len(SIZES) + SIZES.index(prompt.size)
        nothing = torch.tensor(NOTHING)
        return Reading(
            prompt=prompt,
            colour=colour,
            shape=torch.where(seen, best // len(SIZES), nothing),
            size=torch.where(seen, best % len(SIZES), nothing),
            overlap=torch.where(seen, overlaps[:, wanted], torch.tensor(0.0)),
            centres=self._centres(rolled, corner, seen),
            extent=self.world.extent,
            velocity_wanted=self.world.velocities(torch.tensor([prompt.tokens()]))[0],
        )

    def _pixels(self, frames: Tensor) -> Tensor:
        """float32 [F, H, W, 3] in [0, 1] at the size of the world."""
        if frames.ndim == 4 and frames.dtype == torch.uint8 and frames.shape[3] == 3:
            planes = frames.movedim(3, 1).float() / 255
        elif frames.ndim == 4 and frames.is_floating_point() and frames.shape[1] == 3:
            planes = (frames.float() + 1) / 2
        else:
            raise ValueError(
                "frames must be uint8 [F, H, W, 3] or float [F, 3, H, W] in [-1, 1], "
                f"got {frames.dtype} {tuple(frames.shape)}"
            )
        zoom, rest = divmod(planes.shape[2], self.config.height)
        if not len(planes) or rest or zoom < 1 or planes.shape[3] != zoom * self.config.width:
            raise ValueError(
                f"{len(planes)} frames of {planes.shape[2]}x{planes.shape[3]} do not fit "
                f"a world of {self.config.height}x{self.config.width}"
            )
        return torch.nn.functional.avg_pool2d(planes, zoom).movedim(1, 3)

    def _read_colour(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """(colour int64 [F], stretched foreground of the best colour float32 [F, H, W])."""
        difference = rgb - self.world.background
        along = difference @ self.contrast.T  # [F, H, W, colours]
        power = self.contrast.square().sum(1)
        mixing = (along / power).clamp(0, 1)
        # |difference - mixing contrast|^2 less |difference|^2, which is the same for every colour.
        unexplained = (mixing * (mixing * power - 2 * along)).sum((1, 2))
        best = unexplained.argmin(1)
        alpha = mixing[torch.arange(len(rgb)), :, :, best]
        # Faded, blended or tinted shapes lie on the right line but have too little of a core of the right colour.
        core = (alpha > 0.75).float()
        count = core.sum((1, 2))
        mean = (rgb * core[..., None]).sum((1, 2)) / count.clamp_min(1)[:, None]
        near = (mean - self.world.palette[best]).norm(dim=1) < self.colour_limit
        right = near & (count > CORE_LIMIT * (alpha > 0.25).sum((1, 2)))
        return torch.where(right, best, torch.tensor(NOTHING)), _stretch(alpha)

    def _roll_to_middle(self, foreground: Tensor) -> tuple[Tensor, Tensor]:
        """(foreground rolled so that its densest place is the middle, [F, 2] (x, y) that place in the frame)."""
        height, width = self.config.height, self.config.width
        density = torch.fft.irfft2(torch.fft.rfft2(foreground) * self.finder, s=(height, width))
        peak = density.flatten(1).argmax(1)
        shift = torch.stack([peak % width, peak // width], dim=1)  # (x, y)
        rows = (torch.arange(height) + shift[:, 1:]) % height
        columns = (torch.arange(width) + shift[:, :1]) % width
        rolled = foreground[torch.arange(len(foreground))[:, None, None], rows[:, :, None], columns[:, None]]
        return rolled, shift + self.middle

    def _overlaps(self, rolled: Tensor) -> Tensor:
        """Intersection over union with each template at its best position, float32 [F, shapes * sizes]."""
        kinds, positions = self.energies.shape
        inner = rolled.flatten(1) @ self.templates.flatten(0, 1).flatten(1).T
        inner = inner.unflatten(1, (kinds, positions))
        # Tanimoto's coefficient is the overlap of soft masks that a matrix product gives; it places the templates.
        energy = rolled.square().sum((1, 2))[:, None, None]
        place = (inner / (energy + self.energies - inner)).argmax(2)  # [F, kinds]
        chosen = self.templates[torch.arange(kinds), place]  # [F, kinds, H, W]
        mine = rolled[:, None]
        return torch.minimum(mine, chosen).sum((2, 3)) / torch.maximum(mine, chosen).sum((2, 3))

    def _centres(self, rolled: Tensor, corner: Tensor, seen: Tensor) -> Tensor:
        """Centre of gravity of what lies near the middle, back on the torus, float64 [F, 2] (x, y)."""
        weight = rolled.double() * self.near
        total = weight.sum((1, 2))
        x, y = (weight * self.x).sum((1, 2)) / total, (weight * self.y).sum((1, 2)) / total
        centres = (torch.stack([x, y], dim=1) + corner) % self.world.extent
        return torch.where(seen[:, None], centres, torch.full_like(centres, math.nan))


def _stretch(coverage: Tensor) -> Tensor:
    """Coverage with dead zones at both ends: mild noise vanishes, the outline at one half stays where it is."""
    return ((coverage - 0.25) * 2).clamp(0, 1)
