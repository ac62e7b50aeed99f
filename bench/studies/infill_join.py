"""Whether an infilled middle joins its ends: the toy's bidirectional teacher on held-out prompts.

    python -m bench.studies.infill_join runs/toy/teacher/model/teacher.safetensors [--world varied] [--steps 4 24]

The first and the last block of a clip of four are inputs, the two between them are generated. Breaks of the path at
both seams in pixels: of the true clip, the infilled one, and the same ends around a middle generated without them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.lib import report
from bench.lib.script import script
from hiar_model import load_transformer, load_video_model
from hiar_model.common.keyed import keyed_generator
from hiar_model.common.settings import own_settings
from hiar_model.models.registry import ToyDecoder, VideoModel
from hiar_model.rollout.infill import infill
from hiar_model.toy.oracle import ToyOracle
from hiar_model.toy.prompt import ToyPrompt, split_prompts
from hiar_model.toy.world import WORLDS, ToyWorld


@dataclass(frozen=True)
class Join:
    """Means over all videos and both seams; breaks in pixels (:func:`path_breaks`).

    true_break      of the true clip, through the codec: the error of measurement
    infilled_break  of the clip whose middle was infilled
    apart_break     of the same ends around a middle generated without them, from the prompt alone: chance
    seen            share of seams at which the oracle saw the shape on either side, infilled
    colour, shape   share of infilled frames with the prompt's
    """

    videos: int
    blocks: int
    known_blocks: tuple[int, ...]
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
    known_blocks: Sequence[int] = (0, 3),
    seed: int = 0,
    batch: int = 16,
    on_videos: Callable[[int], None] | None = None,
    **options: Any,
) -> Join:
    """Render a clip of each prompt, infill all of its ``blocks`` but ``known_blocks``, and read the paths.

    Args:
        model: a toy model; a bidirectional teacher joins best.
        seed: of the clips' beginnings and of the noise. batch: videos made at once.
        on_videos: called with the number of videos done. options: for :func:`hiar_model.rollout.infill.infill`.

    Raises:
        ValueError: not a toy model, no prompts, or nothing to infill.
    """
    decoder = model.decoder()
    if model.world is None or not isinstance(decoder, ToyDecoder):
        raise ValueError(f"model {model.name!r} shows no toy world: nothing to measure")
    if not prompts or not 0 < len(set(known_blocks)) < blocks:
        got = f"{len(prompts)} prompts, {known_blocks}"
        raise ValueError(f"need prompts, and some of {blocks} blocks known but not all; got {got}")
    world, oracle, codec = ToyWorld(model.world), ToyOracle(model.world), decoder.codec
    rollout, known = model.rollout, torch.zeros(blocks, dtype=torch.bool)
    known[list(known_blocks)] = True
    known = known.repeat_interleave(rollout.frames_per_block)
    where, rows = seams(known), []
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        videos = list(range(first, first + len(some)))
        clean = codec.encode(_clips(world, some, len(known), seed, videos))
        prompt_embeds = torch.cat([model.encode_text(prompt.text()) for prompt in some])
        own = {"frames_per_block": rollout.frames_per_block, "seed": seed, "video_ids": videos, **options}
        infilled, free = (
            infill(model.transformer, clean, ends, prompt_embeds, rollout.schedule, **own).cpu()
            for ends in (known_blocks, ())
        )
        mask = known[:, None, None, None]
        for i, prompt in enumerate(some):
            clips = (clean[i], infilled[i].float(), torch.where(mask, clean[i], free[i].float()))
            readings = [oracle.evaluate(codec.decode(x[None])[0], prompt) for x in clips]
            breaks = [path_breaks(r.centres, r.extent, where) for r in readings]
            right = [float(x[~known].float().mean()) for x in (readings[1].colour_right, readings[1].shape_right)]
            rows.append((breaks, right))
        if on_videos is not None:
            on_videos(len(rows))
    true, infilled, apart = (_mean([x for breaks, _ in rows for x in breaks[kind]]) for kind in range(3))
    of_infilled = [x for breaks, _ in rows for x in breaks[1]]
    seen = sum(math.isfinite(x) for x in of_infilled) / len(of_infilled)
    colour, shape = (_mean([right[kind] for _, right in rows]) for kind in range(2))
    return Join(len(rows), blocks, tuple(known_blocks), true, infilled, apart, seen, colour, shape)


def _clips(world: ToyWorld, prompts: Sequence[ToyPrompt], frames: int, seed: int, videos: Sequence[int]) -> Tensor:
    """[B, F, 3, H, W]; each beginning is a function of (seed, video)."""
    scenes = []
    for prompt, video in zip(prompts, videos, strict=True):
        scenes += world.sample_scenes(1, keyed_generator(seed, "join", video), pool=[prompt])
    return world.render_scenes(scenes, frames)


def _mean(values: Sequence[float]) -> float:
    finite = [x for x in values if math.isfinite(x)]
    return sum(finite) / len(finite) if finite else math.nan


def seams(known: Tensor) -> list[int]:
    """Frames f of one video, known bool [F], where only one of f - 1 and f is known."""
    changes = known[1:] != known[:-1]
    return [int(f) + 1 for f in changes.nonzero()[:, 0]]


def path_breaks(centres: Tensor, extent: Tensor, at: Sequence[int], reach: int = 3) -> list[float]:
    """How far the path of a moving shape breaks at some frames, in pixels; NaN where the shape is not seen.

    At frame f the path of the ``reach`` frames before it is continued by its mean step and compared with the mean
    position of the ``reach`` frames from f on: 0 for one straight line through both.

    Args:
        centres: [F, 2] (x, y) of each frame, as :class:`hiar_model.toy.reading.Reading` has them; nan: not seen.
        extent: [2] size of the frame, whose edges are joined. at: frames with ``reach`` of them on either side.
    """
    if reach < 2:
        raise ValueError(f"reach must be at least 2 frames, to have a step; got {reach}")
    centres, extent = centres.double(), extent.double()
    breaks = []
    for f in at:
        if not reach <= f <= len(centres) - reach:
            raise ValueError(
                f"a seam needs {reach} frames on either side: give {reach}..{len(centres) - reach}, got {f}"
            )
        # steps on the torus: the shorter way round
        steps = (
            centres[f - reach + 1 : f + reach] - centres[f - reach : f + reach - 1] + extent / 2
        ) % extent - extent / 2
        path = torch.cat([steps.new_zeros(1, 2), steps.cumsum(0)])
        before = path[:reach]
        pace = (before[-1] - before[0]) / (reach - 1)
        ahead = before.mean(0) + pace * torch.arange(reach).add(reach - (reach - 1) / 2)[:, None]
        breaks.append(float((path[reach:] - ahead).mean(0).norm()))
    return breaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="of a bidirectional toy transformer")
    as_large = sorted(name for name, world in WORLDS.items() if world.scale == 1)  # the codec below is toy's
    parser.add_argument("--world", default="varied", choices=as_large)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--prompts", type=int, default=64)
    a = parser.parse_args()
    torch.set_num_threads(1)
    toy = load_video_model("toy", "cpu")
    teacher = load_transformer(a.weights, toy.transformer.config, dtype=torch.float32).requires_grad_(False)
    prompts = split_prompts()[1][: a.prompts]
    cells = []
    for steps in a.steps:
        model = replace(toy, transformer=teacher, rollout=toy.rollout.with_options(steps=steps), world=WORLDS[a.world])
        j = measure_join(model, prompts)
        shares = [f"{100 * share:.1f}" for share in (j.seen, j.colour, j.shape)]
        cells.append([str(steps), *(f"{x:.2f}" for x in (j.true_break, j.infilled_break, j.apart_break)), *shares])
    headings = ("steps", "break, true", "infilled", "apart", "seen %", "colour %", "shape %")
    print("\n".join(report.table(headings, cells, text_columns=0)))


if __name__ == "__main__":
    script(main)
