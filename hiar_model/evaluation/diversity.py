"""How different the videos of one prompt are: what the prompt leaves open, over several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.settings import own_settings
from ..toy.reading import Reading
from ..toy.world import FAINTEST, WorldConfig


@dataclass(frozen=True)
class Diversity:
    """Standard deviation over seeds, at one prompt, over that of the world: 1 is as diverse as the world, 0 the same
    video every time, above 1 more than the world shows (a failure too). NaN for what the world does not vary.

    background  colour, mean over the first block
    texture     amplitudes of cosine and sine of every grating, mean over the first block
    start       place in the first frame
    speed       of the first block
    """

    background: float
    texture: float
    start: float
    speed: float

    @staticmethod
    @own_settings()
    def of(world: WorldConfig, prompts: Sequence[Sequence[Reading]]) -> Diversity:
        """``prompts``: for each prompt the readings of its first blocks, one for each seed; NaN readings are left
        out. ValueError for fewer than two seeds."""
        if not prompts or min(map(len, prompts)) < 2:
            raise ValueError("diversity needs at least one prompt, and two seeds of each")
        low, high = world.backgrounds or (world.background, world.background)
        backgrounds = sum((b - a) ** 2 / 12 for a, b in zip(low, high, strict=True))
        # Amplitudes are uniform between the faintest and the strongest: their mean square.
        texture = world.texture**2 * (1 - FAINTEST**3) / (3 * (1 - FAINTEST))
        start = 2 * (world.start_jitter * world.scale) ** 2 / 3
        speeds = torch.tensor(world.speeds, dtype=torch.float64) * world.scale
        speed = float(speeds.var(correction=0)) if world.free_speed else 0.0
        return Diversity(
            background=_ratio([_rows([r.background.mean(0) for r in seeds]) for seeds in prompts], backgrounds),
            texture=_ratio([_rows([r.texture.mean(0).flatten() for r in seeds]) for seeds in prompts], texture),
            start=_ratio([_starts(seeds) for seeds in prompts], start),
            speed=_ratio([_rows([r.velocity.norm().view(1) for r in seeds]) for seeds in prompts], speed),
        )


def _rows(values: Sequence[Tensor]) -> Tensor:
    """[seeds, n] without seeds whose values are not finite."""
    rows = torch.stack(list(values)).double()
    return rows[rows.isfinite().all(1)]


def _starts(seeds: Sequence[Reading]) -> Tensor:
    """First centres as offsets from the middle of the frame, so that the edges of the torus are far."""
    extent = seeds[0].extent
    return _rows([reading.centres[0] % extent - extent / 2 for reading in seeds])


def _ratio(prompts: Sequence[Tensor], variance: float) -> float:
    """Root of the mean over the prompts of the variance over seeds (summed over columns), over the world's."""
    if variance <= 0:
        return math.nan
    shown = [rows.var(0).sum() for rows in prompts if len(rows) > 1]
    if not shown:
        return math.nan
    return math.sqrt(float(torch.stack(shown).mean()) / variance)
