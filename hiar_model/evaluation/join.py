"""How well an infilled middle joins the two ends that were given, in the toy world, where the truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.keyed import keyed_generator
from ..common.settings import own_settings
from ..models.registry import ToyDecoder, VideoModel
from ..rollout.infill import infill, path_breaks, seams
from ..toy.oracle import ToyOracle
from ..toy.prompt import ToyPrompt
from ..toy.world import ToyWorld


@dataclass(frozen=True)
class Join:
    """Means over all videos and both seams; breaks in pixels (:func:`hiar_model.rollout.infill.path_breaks`).

    true_break      of the true clip, through the codec: what the oracle cannot tell from none
    infilled_break  of the clip whose middle was infilled
    apart_break     of the same ends around a middle made without them, from the prompt alone: what chance gives
    seen            share of seams at which the oracle saw the thing on either side, infilled
    colour, shape   share of infilled frames with the prompt's
    """

    videos: int
    blocks: int
    given: tuple[int, ...]
    true_break: float
    infilled_break: float
    apart_break: float
    seen: float
    colour: float
    shape: float


@own_settings()
def measure_join(
    model: VideoModel,
    prompts: Sequence[ToyPrompt],
    *,
    blocks: int = 4,
    given: Sequence[int] = (0, 3),
    seed: int = 0,
    batch: int = 16,
    on_videos: Callable[[int], None] | None = None,
    **options: Any,
) -> Join:
    """Render a clip of each prompt, keep the ``given`` blocks of ``blocks``, infill the others, and read the paths.

    Args:
        model: a toy model; a bidirectional teacher joins best.
        seed: of the clips' beginnings and of the noise. batch: videos made at once.
        on_videos: called with the number of videos done. options: for :func:`hiar_model.rollout.infill.infill`.

    Raises:
        ValueError: no toy model, no prompts, or nothing left to infill.
    """
    decoder = model.decoder()
    if model.world is None or not isinstance(decoder, ToyDecoder):
        raise ValueError(f"model {model.name!r} shows no toy world: nothing to measure")
    if not prompts or not 0 < len(set(given)) < blocks:
        raise ValueError(f"need prompts, and some of {blocks} blocks given but not all; got {len(prompts)}, {given}")
    world, oracle, codec = ToyWorld(model.world), ToyOracle(model.world), decoder.codec
    known = torch.zeros(blocks, dtype=torch.bool)
    known[list(given)] = True
    known = known.repeat_interleave(model.frames_per_block)
    where, rows = seams(known), []
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        videos = list(range(first, first + len(some)))
        clean = codec.encode(_clips(world, some, len(known), seed, videos))
        text = torch.cat([model.encode_text(prompt.text()) for prompt in some])
        own = {"frames_per_block": model.frames_per_block, "seed": seed, "video_ids": videos, **options}
        made, free = (infill(model.transformer, clean, n, text, model.schedule, **own).cpu() for n in (given, ()))
        mask = known[None, :, None, None, None]
        for i, prompt in enumerate(some):
            clips = (clean[i], made[i].float(), torch.where(mask[0], clean[i], free[i].float()))
            readings = [oracle.evaluate(codec.decode(x[None])[0], prompt) for x in clips]
            breaks = [path_breaks(r.centres, r.extent, where) for r in readings]
            new = ~known
            right = [float(x[new].float().mean()) for x in (readings[1].colour_right, readings[1].shape_right)]
            rows.append((breaks, right))
        if on_videos is not None:
            on_videos(len(rows))
    true, infilled, apart = (_mean([x for breaks, _ in rows for x in breaks[kind]]) for kind in range(3))
    of_infilled = [x for breaks, _ in rows for x in breaks[1]]
    seen = sum(math.isfinite(x) for x in of_infilled) / len(of_infilled)
    colour, shape = (_mean([right[kind] for _, right in rows]) for kind in range(2))
    return Join(len(rows), blocks, tuple(given), true, infilled, apart, seen, colour, shape)


def _clips(world: ToyWorld, prompts: Sequence[ToyPrompt], frames: int, seed: int, videos: Sequence[int]) -> Tensor:
    """[B, F, 3, H, W]; each beginning is a function of (seed, video)."""
    scenes = []
    for prompt, video in zip(prompts, videos, strict=True):
        scenes += world.sample_scenes(1, keyed_generator(seed, "join", video), pool=[prompt])
    return world.render_scenes(scenes, frames)


def _mean(values: Sequence[float]) -> float:
    finite = [x for x in values if math.isfinite(x)]
    return sum(finite) / len(finite) if finite else math.nan
