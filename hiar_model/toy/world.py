"""Synthetic video with ground truth: one shape of one colour that moves steadily over a torus.

Everything follows from `WorldConfig` and a `Scene`: a prompt, a start position and, in a world that varies it, what the
prompt does not fix (background, texture). There is no hidden state, so frame 1,000,000 costs what frame 0 costs.
Lengths in the config are pixels of a frame whose shorter side is `reference_side`, and scale with the real frame. x
grows to the right, y grows downwards, pixel i covers [i, i + 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..common.keyed import Generator, draw_uniform, draw_whole
from ..common.settings import own_settings
from .prompt import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SLOT_OFFSETS,
    SLOTS,
    SPEEDS,
    ToyPrompt,
    random_tokens,
    token_table,
)

RGB = tuple[float, float, float]
Start = Literal["center", "anywhere"]

_PALETTE: dict[str, RGB] = {
    "red": (0.90, 0.12, 0.14),
    "green": (0.12, 0.72, 0.20),
    "blue": (0.16, 0.30, 0.96),
    "yellow": (0.96, 0.90, 0.16),
    "orange": (0.98, 0.52, 0.06),
    "purple": (0.70, 0.18, 0.86),
    "cyan": (0.14, 0.82, 0.92),
    "white": (0.96, 0.96, 0.96),
}

# Extents at which every shape has the area of the circle of radius 1.
_SQUARE_HALF = math.sqrt(math.pi) / 2
_TRIANGLE_INRADIUS = math.sqrt(math.pi / (3 * math.sqrt(3)))
_PLUS_HALF_WIDTH = math.sqrt(math.pi / 20)
_PLUS_REACH = 3 * _PLUS_HALF_WIDTH
_LARGEST_REACH = 2 * _TRIANGLE_INRADIUS  # a corner of the triangle lies farthest from its centre

WAVES: tuple[tuple[int, int], ...] = ((2, 0), (0, 2), (2, 2), (2, -2), (3, 0), (0, 3))
"""Gratings of the texture: whole cycles (x, y) over the frame, so that they close on the torus; 11 to 16 reference
pixels long, which the codec keeps."""
LIGHT_WAVES: tuple[tuple[int, int], ...] = ((1, 0), (0, 1), (1, 1), (1, -1))
"""Of the light: one cycle over the frame, so that one side is bright and the other dark."""
FAINTEST = 1 / 3
"""Amplitude of the faintest texture, or light, of a world over that of its strongest."""


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and colours of the world. Tuples follow the word lists of `prompt`; colours are RGB in [0, 1]."""

    height: int = 32
    width: int = 32
    reference_side: float = 32.0
    radii: tuple[float, ...] = (4.0, 5.5, 7.0)  # of the circle; the other shapes have its area
    speeds: tuple[float, ...] = (0.6, 1.1, 1.8)  # per frame, along the direction, diagonals too
    edge: float = 1.5  # width of the anti-aliased edge, in real pixels; a sharper one costs the codec detail
    start_jitter: float = 0.5  # largest distance from the centre, per axis, of a start "center"
    background: RGB = (0.08, 0.09, 0.14)
    palette: tuple[RGB, ...] = tuple(_PALETTE[colour] for colour in COLOURS)
    backgrounds: tuple[RGB, RGB] | None = None  # corners of the box of each video's own background; None: `background`
    texture: float = 0.0  # largest amplitude of a still grey grating on the background, [0, 1] RGB; 0: none
    light: float = 0.0  # largest amplitude of a still soft light on the background, from one side; 0: even light
    distractor: RGB | None = None  # colour of a second shape that no prompt tells, which crosses behind the first
    free_speed: bool = False  # no prompt tells the speed: every video has one of the three as its own

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or self.edge <= 0 or self.reference_side <= 0:
            raise ValueError("height, width, edge and reference_side must be positive")
        for name, words in (("radii", SIZES), ("speeds", SPEEDS), ("palette", COLOURS)):
            if len(getattr(self, name)) != len(words):
                raise ValueError(f"{name} needs {len(words)} entries, one for each of {', '.join(words)}")
        if max(self.radii) * self.scale * _LARGEST_REACH + self.edge > min(self.height, self.width) / 2:
            raise ValueError("the largest shape would overlap itself across the torus; lower radii")
        low, high = self.backgrounds or (self.background, self.background)
        if len(low) != 3 or len(high) != 3 or any(a > b for a, b in zip(low, high, strict=True)):
            raise ValueError(f"backgrounds must be two colours (r, g, b), low <= high, got {self.backgrounds}")
        if min(self.texture, self.light) < 0 or self.texture + self.light > min(*low, *(1 - value for value in high)):
            raise ValueError(
                f"texture {self.texture} and light {self.light} must be at least 0 and keep backgrounds {low}..{high} "
                "in [0, 1]"
            )

    @property
    def scale(self) -> float:
        """Real pixels per reference pixel."""
        return min(self.height, self.width) / self.reference_side


_SCENES = WorldConfig(
    backgrounds=((0.14, 0.14, 0.14), (0.46, 0.36, 0.46)), texture=0.1, light=0.04, distractor=(0.02, 0.02, 0.03)
)

WORLDS: dict[str, WorldConfig] = {
    "plain": WorldConfig(),
    # Dark enough that every colour of the palette stands out, wide enough that a video can lose its own background.
    "varied": WorldConfig(backgrounds=((0.14, 0.14, 0.14), (0.46, 0.36, 0.46)), texture=0.1),
    "free_speed": WorldConfig(backgrounds=((0.14, 0.14, 0.14), (0.46, 0.36, 0.46)), texture=0.1, free_speed=True),
    "scenes": _SCENES,
    "scenes_64": replace(_SCENES, height=64, width=64, edge=3.0),
}
"""Named worlds. "plain": the prompt fixes everything but the start. "varied": a background and a texture of its own for
each video, which only the video's own past tells. "free_speed": that, and how fast the shape moves. "scenes": varied,
lit from one side, and a dark second shape crosses behind the prompted one. "scenes_64": the same pictures, edges too,
in twice the pixels along each side."""


@dataclass(frozen=True)
class Grating:
    """A still wave, the same in the three channels: amplitude * cos(2 pi (kx x / width + ky y / height) + phase)."""

    amplitude: float  # [0, 1] RGB
    wave: tuple[int, int]  # whole cycles (kx, ky) over the frame
    phase: float  # radians


@dataclass(frozen=True)
class Distractor:
    """A second shape, of the smallest size: where its centre is in frame 0 and how fast it moves, in real pixels."""

    shape: int  # index of SHAPES
    x: float
    y: float
    velocity: tuple[float, float]  # (x, y) per frame


@dataclass(frozen=True)
class Scene:
    """One video: what moves, where its centre is in frame 0 (real pixels), and what it moves over."""

    prompt: ToyPrompt
    x: float
    y: float
    background: RGB | None = None  # [0, 1]; None: the world's
    texture: Grating | None = None  # None: flat
    light: Grating | None = None  # None: even
    distractor: Distractor | None = None  # None: nothing crosses behind the shape


class Sample(NamedTuple):
    """A batch from `ToyWorld.sample_batch`."""

    videos: Tensor  # float32 [B, F, 3, H, W] in [-1, 1]
    prompts: list[ToyPrompt]
    tokens: Tensor  # int64 [B, PROMPT_TOKENS]
    scenes: list[Scene]


class ToyWorld:
    """Renders scenes of one `WorldConfig`, on the CPU. The tables are indexed like the word lists of `prompt`."""

    @own_settings()
    def __init__(self, config: WorldConfig | None = None) -> None:
        self.config = config or WorldConfig()
        self.palette = torch.tensor(self.config.palette)  # [colours, 3] in [0, 1]
        self.background = torch.tensor(self.config.background)  # [3] in [0, 1]
        self.radii = torch.tensor(self.config.radii) * self.config.scale  # real pixels
        self.speeds = torch.tensor(self.config.speeds, dtype=torch.float64) * self.config.scale
        angles = torch.arange(len(DIRECTIONS), dtype=torch.float64) * (2 * math.pi / len(DIRECTIONS))
        self.headings = torch.stack([angles.cos(), -angles.sin()], dim=1)  # [directions, (x, y)], up is negative y
        self.extent = torch.tensor([self.config.width, self.config.height], dtype=torch.float64)  # (x, y)

    @own_settings()
    def attributes(self, tokens: Tensor) -> dict[str, Tensor]:
        """Token ids [B, PROMPT_TOKENS] -> index into the word list of each slot, int64 [B]. ValueError for a token
        that is null or in another's slot."""
        indices = {}
        for slot, (offset, (name, words)) in enumerate(zip(SLOT_OFFSETS, SLOTS.items(), strict=True)):
            index = tokens[:, slot] - offset
            if bool(((index < 0) | (index >= len(words))).any()):
                raise ValueError(f"tokens of slot {name} must be in {offset}..{offset + len(words) - 1}")
            indices[name] = index
        return indices

    @own_settings()
    def velocities(self, tokens: Tensor) -> Tensor:
        """(x, y) in real pixels per frame, float64 [B, 2]."""
        index = self.attributes(tokens)
        return self.headings[index["direction"]] * self.speeds[index["speed"]][:, None]

    @own_settings()
    def expected_velocities(self, tokens: Tensor) -> Tensor:
        """`velocities`, at the mean speed where no prompt tells it."""
        if not self.config.free_speed:
            return self.velocities(tokens)
        return self.headings[self.attributes(tokens)["direction"]] * self.speeds.mean()

    @own_settings()
    def centres(self, tokens: Tensor, starts: Tensor, num_frames: int, first_frame: int = 0) -> Tensor:
        """Centres (x, y) in [0, width) x [0, height), float64 [B, num_frames, 2], of clips that are at `starts` [B, 2]
        in frame 0."""
        frames = torch.arange(first_frame, first_frame + num_frames, dtype=torch.float64)
        path = starts.double()[:, None] + frames[:, None] * self.velocities(tokens)[:, None]
        return path % self.extent

    @own_settings()
    def coverage(self, shape: int, radii: Tensor, centres: Tensor) -> Tensor:
        """How much of each pixel one shape covers, float32 [N, H, W] in [0, 1]; radii [N], centres [N, 2] (x, y), in
        real pixels."""
        height, width = self.config.height, self.config.width
        x = (torch.arange(width) + 0.5 - centres[:, :1] + width / 2) % width - width / 2  # shortest way on the torus
        y = (torch.arange(height) + 0.5 - centres[:, 1:] + height / 2) % height - height / 2
        distance = _signed_distance(shape, x.float()[:, None, :], y.float()[:, :, None], radii.float()[:, None, None])
        return (0.5 - distance / self.config.edge).clamp_(0, 1)

    @own_settings()
    def backdrops(self, scenes: Sequence[Scene]) -> Tensor:
        """What the shapes move over: float32 [len(scenes), 3, H, W] in [0, 1]."""
        colours = [scene.background or self.config.background for scene in scenes]
        flat = torch.tensor(colours)[:, :, None, None].expand(-1, -1, self.config.height, self.config.width)
        for name in ("texture", "light"):
            gratings = [getattr(scene, name) or Grating(0.0, (0, 0), 0.0) for scene in scenes]
            if any(grating.amplitude for grating in gratings):
                flat = flat + self._waves(gratings)[:, None]
        return flat

    def _with_distractors(
        self, backdrops: Tensor, scenes: Sequence[Scene], num_frames: int, first_frame: int
    ) -> Tensor:
        """Backdrops [B, 3, H, W] of each frame, with the second shapes: [B, num_frames, 3, H, W]."""
        colour = torch.tensor(self.config.distractor or self.config.background)[:, None, None]
        frames = torch.arange(first_frame, first_frame + num_frames, dtype=torch.float64)[:, None]
        moving = backdrops[:, None].repeat(1, num_frames, 1, 1, 1)
        for still, of_scene, scene in zip(backdrops, moving, scenes, strict=True):
            if (one := scene.distractor) is not None:
                start, velocity = torch.tensor([[one.x, one.y], one.velocity], dtype=torch.float64)
                centres = (start + frames * velocity) % self.extent
                cover = self.coverage(one.shape, self.radii[0].expand(num_frames), centres)
                of_scene += cover[:, None] * (colour - still)
        return moving

    def _waves(self, gratings: Sequence[Grating]) -> Tensor:
        """float32 [len(gratings), H, W]."""
        amplitudes = torch.tensor([grating.amplitude for grating in gratings])
        phases = torch.tensor([grating.phase for grating in gratings])
        angles = self.wave_angles([grating.wave for grating in gratings]) + phases[:, None, None]
        return amplitudes[:, None, None] * angles.cos()

    @own_settings()
    def wave_angles(self, waves: Sequence[tuple[int, int]]) -> Tensor:
        """Angle of each grating at phase 0 in the middle of every pixel, radians, float32 [len(waves), H, W]."""
        x = (torch.arange(self.config.width) + 0.5) * (2 * math.pi / self.config.width)
        y = (torch.arange(self.config.height) + 0.5) * (2 * math.pi / self.config.height)
        cycles = torch.tensor(waves)
        return cycles[:, 0, None, None] * x + cycles[:, 1, None, None] * y[:, None]

    @own_settings()
    def render_batch(
        self,
        tokens: Tensor,
        starts: Tensor,
        num_frames: int,
        first_frame: int = 0,
        backdrops: Tensor | None = None,
    ) -> Tensor:
        """Clips of tokens [B, PROMPT_TOKENS] with centres `starts` [B, 2] (x, y) in frame 0, from `first_frame` on,
        over `backdrops` [B, 3, H, W], or [B, num_frames, 3, H, W] where they move, in [0, 1] (None: the world's
        background): float32 [B, num_frames, 3, H, W] in [-1, 1]."""
        index = self.attributes(tokens)
        centres = self.centres(tokens, starts, num_frames, first_frame)
        cover = torch.empty(len(tokens), num_frames, self.config.height, self.config.width)
        for shape in range(len(SHAPES)):
            rows = (index["shape"] == shape).nonzero()[:, 0]
            if len(rows):
                radii = self.radii[index["size"][rows]].repeat_interleave(num_frames)
                cover[rows] = self.coverage(shape, radii, centres[rows].flatten(0, 1)).unflatten(0, (-1, num_frames))
        still = self.background[:, None, None] if backdrops is None else backdrops
        if still.ndim == 4:
            still = still[:, None]
        contrast = self.palette[index["colour"]][:, None, :, None, None] - still  # [B, F or 1, 3, H or 1, W or 1]
        mixed = cover[:, :, None] * (2 * contrast)
        return mixed.add_(2 * still - 1)

    @own_settings()
    def render_scenes(self, scenes: Sequence[Scene], num_frames: int, first_frame: int = 0) -> Tensor:
        """Frames [first_frame, first_frame + num_frames) of several scenes, float32 [len(scenes), num_frames, 3, H, W]
        in [-1, 1]; ValueError if there is none."""
        if not scenes:
            raise ValueError("no scene to render")
        starts = torch.tensor([[scene.x, scene.y] for scene in scenes], dtype=torch.float64)
        own = any(scene.background or scene.texture or scene.light for scene in scenes)
        backdrops = self.backdrops(scenes) if own else None
        if any(scene.distractor for scene in scenes):
            backdrops = self._with_distractors(self.backdrops(scenes), scenes, num_frames, first_frame)
        return self.render_batch(
            token_table([scene.prompt for scene in scenes]), starts, num_frames, first_frame, backdrops
        )

    def render(self, scene: Scene, first_frame: int, num_frames: int) -> Tensor:
        """Frames [first_frame, first_frame + num_frames) of one scene, float32 [num_frames, 3, H, W] in [-1, 1]."""
        return self.render_scenes([scene], num_frames, first_frame)[0]

    @own_settings()
    def sample_starts(self, batch: int, generator: Generator, start: Start = "center") -> Tensor:
        """Centres in frame 0, float64 [batch, 2] (x, y): "center" within the jitter of the middle of the frame,
        "anywhere" uniform on the torus, like a clip from the middle of a video."""
        unit = draw_uniform(generator, batch, 2, dtype=torch.float64)
        if start == "center":
            return self.extent / 2 + (2 * unit - 1) * self.config.start_jitter * self.config.scale
        if start == "anywhere":
            return unit * self.extent
        raise ValueError(f'start must be "center" or "anywhere", got {start!r}')

    @own_settings()
    def sample_scenes(
        self,
        batch: int,
        generator: Generator,
        start: Start = "center",
        pool: Tensor | Sequence[ToyPrompt] | None = None,
    ) -> list[Scene]:
        """`batch` random scenes; the same generator state gives the same scenes. Prompts are uniform over the grammar,
        or over `pool` (prompts, or their token ids [P, PROMPT_TOKENS]); what the world varies is uniform too."""
        if pool is not None and not isinstance(pool, Tensor):
            pool = token_table(pool)
        tokens = random_tokens(batch, generator, pool)
        starts = self.sample_starts(batch, generator, start).tolist()
        prompts = [ToyPrompt.from_tokens(row) for row in tokens.tolist()]
        # Drawn last: a world that varies nothing draws nothing, and its scenes stay what they were.
        backgrounds: list[RGB | None] = [None] * batch
        if self.config.backgrounds is not None:
            low, high = (torch.tensor(colour, dtype=torch.float64) for colour in self.config.backgrounds)
            unit = draw_uniform(generator, batch, 3, dtype=torch.float64)
            backgrounds = [(r, g, b) for r, g, b in (low + unit * (high - low)).tolist()]
        textures = _sample_gratings(batch, generator, self.config.texture, WAVES)
        lights = _sample_gratings(batch, generator, self.config.light, LIGHT_WAVES)
        distractors = self._sample_distractors(batch, generator)
        return [
            Scene(prompt, x, y, background, texture, light, distractor)
            for prompt, (x, y), background, texture, light, distractor in zip(
                prompts, starts, backgrounds, textures, lights, distractors, strict=True
            )
        ]

    def _sample_distractors(self, batch: int, generator: Generator) -> Sequence[Distractor | None]:
        """Uniform in shape, direction, speed and place; nothing is drawn for a world without."""
        if self.config.distractor is None:
            return [None] * batch
        shapes = draw_whole(generator, len(SHAPES), batch).tolist()
        headings = self.headings[draw_whole(generator, len(DIRECTIONS), batch)]
        speeds = self.speeds[draw_whole(generator, len(SPEEDS), batch)]
        places = (draw_uniform(generator, batch, 2, dtype=torch.float64) * self.extent).tolist()
        velocities = (headings * speeds[:, None]).tolist()
        return [
            Distractor(shape, x, y, (u, v)) for shape, (x, y), (u, v) in zip(shapes, places, velocities, strict=True)
        ]

    def sample_batch(
        self,
        batch: int,
        num_frames: int,
        generator: Generator,
        start: Start = "center",
        pool: Tensor | Sequence[ToyPrompt] | None = None,
    ) -> Sample:
        """`batch` random clips: `sample_scenes`, rendered."""
        scenes = self.sample_scenes(batch, generator, start, pool)
        prompts = [scene.prompt for scene in scenes]
        return Sample(self.render_scenes(scenes, num_frames), prompts, token_table(prompts), scenes)


def _sample_gratings(
    batch: int, generator: Generator, strongest: float, waves: Sequence[tuple[int, int]]
) -> Sequence[Grating | None]:
    """Uniform in amplitude from the faintest to the strongest, in wave and in phase; nothing is drawn for 0."""
    if not strongest:
        return [None] * batch
    kinds = draw_whole(generator, len(waves), batch).tolist()
    unit = draw_uniform(generator, batch, 2, dtype=torch.float64)
    strengths = (strongest * (FAINTEST + (1 - FAINTEST) * unit[:, 0])).tolist()
    phases = (2 * math.pi * unit[:, 1]).tolist()
    return [Grating(a, waves[k], p) for a, k, p in zip(strengths, kinds, phases, strict=True)]


def _signed_distance(shape: int, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance to the outline, negative inside; exact near straight edges, which is all the anti-aliasing needs."""
    name = SHAPES[shape]
    if name == "circle":
        return (x * x + y * y).sqrt() - radius
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - _SQUARE_HALF * radius
    if name == "triangle":  # upright, centred on its centroid
        slanted = x.abs() * (math.sqrt(3) / 2) - y / 2
        return torch.maximum(slanted, y) - _TRIANGLE_INRADIUS * radius
    if name == "plus":
        x, y = x.abs(), y.abs()
        reach, half_width = _PLUS_REACH * radius, _PLUS_HALF_WIDTH * radius
        return torch.minimum(torch.maximum(x - reach, y - half_width), torch.maximum(x - half_width, y - reach))
    raise ValueError(f"no outline for shape {name!r}")
