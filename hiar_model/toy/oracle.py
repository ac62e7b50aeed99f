"""Reads colour, shape, size, position and motion back from pixels, and compares them with the prompt.

Per frame: every pixel is explained as a mixture of background and one legal colour; the colour that leaves the least
unexplained is read, and the mixing weight is the foreground. Where the world varies the background, it is the one that
the frame itself shows (`backdrop`), so that a shape is read over a background that has drifted. The foreground is
compared with templates of every shape and size, each at its best position. Per clip: one straight line is fitted to the
unwrapped path.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.settings import own_settings
from .backdrop import Backdrop, BackdropReader
from .prompt import SHAPES, SIZES, ToyPrompt, parse
from .reading import NOTHING, Reading
from .world import ToyWorld, WorldConfig

CORE_LIMIT = 0.25
"""A frame has a colour if more than this share of its foreground pixels is hardly mixed with background; the smallest
plus has 0.44."""
SATURATED = 4 / 255
"""A pixel value this close to an end of [0, 1] is saturated; nothing in the worlds is."""
CHUNK = 256
"""Frames read at once."""


class ToyOracle:
    """Reads videos of the world of one `WorldConfig`. Building it renders the templates (some 0.1 s): keep it."""

    @own_settings()
    def __init__(self, config: WorldConfig | None = None, *, reach: float = 1.5, step: float = 0.25) -> None:
        """Templates are tried up to `reach` around the first guess of the position, `step` apart; reference pixels."""
        self.world = ToyWorld(config)
        self.config = self.world.config
        self.varied = self.config.backgrounds is not None or self.config.texture + self.config.light > 0
        self.backdrops = BackdropReader(self.world)
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
        # What lies farther away than any shape reaches belongs to something else.
        self.near = (square.sqrt() < 1.6 * self.world.radii.max() + self.config.edge).double()

    @own_settings()
    def evaluate(self, frames: Tensor, prompt: str | ToyPrompt) -> Reading:
        """Read a video: uint8 [F, H, W, 3], or float [F, 3, H, W] in [-1, 1]; whole multiples of the world's frame
        size are averaged down first. ValueError for another shape, or a prompt outside the grammar."""
        prompt = parse(prompt) if isinstance(prompt, str) else prompt
        template = SHAPES.index(prompt.shape) * len(SIZES) + SIZES.index(prompt.size)
        chunks = [self._read(rgb, template) for rgb in self._pixels(frames).split(CHUNK)]
        colour, shape, size, overlap, centres, background, texture, light, saturation = map(
            torch.cat, zip(*chunks, strict=True)
        )
        backdrop = Backdrop(background, texture, light)
        return Reading(
            prompt=prompt,
            colour=colour,
            shape=shape,
            size=size,
            overlap=overlap,
            centres=centres,
            extent=self.world.extent,
            velocity_expected=self.world.expected_velocities(torch.tensor([prompt.tokens()]))[0],
            background=background,
            background_change=backdrop.colour_change(),
            texture=texture,
            texture_ratio=backdrop.texture_ratio(),
            texture_kept=backdrop.texture_kept(),
            light=light,
            light_kept=backdrop.light_kept(),
            saturation=saturation,
        )

    def _read(self, rgb: Tensor, template: int) -> tuple[Tensor, ...]:
        """The tensors of `Reading` that a frame has by itself: colour, shape, size, overlap, centres, background,
        texture, light, saturation; of frames [F, H, W, 3]. `template`: index of the prompted one."""
        backdrop, image = self.backdrops.read(rgb)
        colour, foreground = self._read_colour(rgb, image if self.varied else self.world.background)
        seen = foreground.flatten(1).sum(1) > 0.5  # pixels
        rolled, corner = self._roll_to_middle(foreground)
        overlaps = self._overlaps(rolled)
        best = overlaps.argmax(1)
        nothing = torch.tensor(NOTHING)
        return (
            colour,
            torch.where(seen, best // len(SIZES), nothing),
            torch.where(seen, best % len(SIZES), nothing),
            torch.where(seen, overlaps[:, template], torch.tensor(0.0)),
            self._centres(rolled, corner, seen),
            backdrop.colour,
            backdrop.waves,
            backdrop.light,
            ((rgb - 0.5).abs() >= 0.5 - SATURATED).flatten(1).float().mean(1),
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

    def _read_colour(self, rgb: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
        """(colour int64 [F], stretched foreground of the best colour float32 [F, H, W]) over a background [3], or
        [F, H, W, 3]."""
        difference, palette = rgb - background, self.world.palette
        # Of each colour against the background of each pixel, [F, H, W, colours]: the contrast's product with the
        # difference, and with itself.
        along = difference @ palette.T - (difference * background).sum(-1, keepdim=True)
        power = palette.square().sum(1) - 2 * background @ palette.T + background.square().sum(-1, keepdim=True)
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
        """(foreground rolled so that its densest point is in the middle, [F, 2] (x, y) that point in the frame)."""
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
        position = (inner / (energy + self.energies - inner)).argmax(2)  # [F, kinds]
        chosen = self.templates[torch.arange(kinds), position]  # [F, kinds, H, W]
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
