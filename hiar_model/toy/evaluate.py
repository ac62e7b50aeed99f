"""How much of their prompts a toy model's videos keep, read back from pixels by the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..bundle import VideoModel
from ..rollout import Rollout
from .oracle import Reading, Summary, ToyOracle
from .prompt import ToyPrompt

PARTS = 6
"""A video is judged as a whole and in this many stretches, so that a decline over time shows."""


@dataclass(frozen=True)
class EvaluationRow:
    """One order at one length: means over all videos, as a whole (``whole``) and stretch by stretch (``parts``)."""

    order: str
    num_frames: int
    videos: int
    whole: Summary
    parts: tuple[Summary, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON; a figure that could not be measured is None."""
        return _plain(asdict(self))


def evaluate_toy(
    model: VideoModel,
    prompts: Sequence[ToyPrompt],
    *,
    seed: int = 0,
    num_frames: Sequence[int],
    order: Sequence[str] = ("step_first", "block_first"),
    batch: int = 16,
    on_videos: Callable[[int, int], None] | None = None,
) -> list[EvaluationRow]:
    """Make a video of every prompt, at each length in each order, and read it.

    Args:
        model: a toy model. prompts: one video each, with noise of its own (video i of ``seed``).
        num_frames, order: the lengths in pixel frames and the orders to measure; every pair gives a row.
        batch: videos made at once; it does not change them.
        on_videos: called with (videos done, videos in all) after every batch.

    Raises:
        ValueError: no toy model, no prompt, an illegal length or order.
        FloatingPointError: latents that are not finite.
    """
    if model.world is None:
        raise ValueError(f"model {model.name!r} shows no toy world: nothing to measure")
    if not prompts or batch < 1:
        raise ValueError(f"need at least one prompt and a batch of at least 1, got {len(prompts)} and {batch}")
    for frames in num_frames:
        model.latent_frames(frames)
        if frames < PARTS:
            raise ValueError(f"a video is judged in {PARTS} stretches: at least {PARTS} frames, got {frames}")
    oracle = ToyOracle(model.world)
    cases = [(frames, name) for frames in num_frames for name in order]
    rows = []
    for index, (frames, name) in enumerate(cases):
        readings: list[Reading] = []
        for first in range(0, len(prompts), batch):
            videos = range(first, min(first + batch, len(prompts)))
            readings += _read(model, oracle, [prompts[i] for i in videos], videos, seed, frames, name)
            if on_videos is not None:
                on_videos(index * len(prompts) + len(readings), len(cases) * len(prompts))
        stretches = zip(*(reading.parts(PARTS) for reading in readings), strict=True)
        parts = tuple(Summary.of(stretch) for stretch in stretches)
        rows.append(EvaluationRow(name, frames, len(prompts), Summary.of(readings), parts))
    return rows


def _read(
    model: VideoModel,
    oracle: ToyOracle,
    prompts: Sequence[ToyPrompt],
    videos: Sequence[int],
    seed: int,
    num_frames: int,
    order: str,
) -> list[Reading]:
    """Readings of one batch."""
    _, height, width = model.latent_size
    rollout = Rollout(
        model.transformer,
        torch.cat([model.encode_text(prompt.text()) for prompt in prompts]),
        model.schedule,
        num_frames=model.latent_frames(num_frames),
        height=height,
        width=width,
        batch=len(prompts),
        order=order,
        frames_per_block=model.frames_per_block,
        window_frames=model.window_frames,
        sink_frames=model.sink_frames,
        seed=seed,
        video_ids=videos,
    )
    decoders = [model.decoder() for _ in prompts]
    frames: list[list[torch.Tensor]] = [[] for _ in prompts]
    for block in rollout:
        for i, decoder in enumerate(decoders):
            frames[i].append(torch.from_numpy(decoder.decode(block.latents[i : i + 1])))
    return [oracle.evaluate(torch.cat(clip), prompt) for clip, prompt in zip(frames, prompts, strict=True)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
