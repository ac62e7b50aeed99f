"""How well a toy model's videos keep their prompts and their own first frames, read from pixels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.checks import whole
from ..common.settings import own_settings
from ..config import ExecutionConfig, RolloutConfig
from ..io.plot import Lines, Series, save_plot
from ..models.registry import VideoModel
from ..rollout import Rollout
from ..schedule.plan import Plan
from ..toy.oracle import ToyOracle
from ..toy.prompt import ToyPrompt
from ..toy.reading import Reading, Summary
from .diversity import Diversity
from .quality import ORDER_COLOURS, ordinal

PARTS = 6
"""Default number of stretches that a video is judged in, beside the whole, so that a decline over time shows."""


@dataclass(frozen=True)
class EvaluationRow:
    """One rollout at one length: means over all videos, of whole videos (``whole``) and stretch by stretch (``parts``).

    forwards, visible_frames  of a block once the window is full: forwards of the network, and latent frames that one of
                              them sees on average, its own among them
    diversity                 None if it was not measured; the same for all lengths of a rollout
    """

    rollout: RolloutConfig
    num_frames: int
    videos: int
    whole: Summary
    parts: tuple[Summary, ...]
    forwards: float
    visible_frames: float
    diversity: Diversity | None = None

    @property
    def drift(self) -> float:
        """Share of valid frames in the last stretch less that in the first: negative where quality falls."""
        return self.parts[-1].valid - self.parts[0].valid

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON; what could not be measured is None."""
        return _plain({**asdict(self), "drift": self.drift})


@own_settings()
def evaluate_toy(
    model: VideoModel,
    prompts: Sequence[ToyPrompt],
    *,
    seed: int = 0,
    num_frames: Sequence[int],
    rollouts: Sequence[RolloutConfig] | None = None,
    parts: int = PARTS,
    seeds: int = 0,
    batch: int = 16,
    execution: ExecutionConfig | None = None,
    on_videos: Callable[[int, int], None] | None = None,
) -> list[EvaluationRow]:
    """Make a video of every prompt, at each length by each rollout, and read it.

    Context is causal and noise belongs to (video, step, block): the first frames of a video are the shorter video, so
    one rollout of the greatest length serves all.

    Args:
        model: a toy model. prompts: one video each, with noise of its own (video i of ``seed``).
        num_frames: lengths in pixel frames. rollouts: what is compared; every pair of a length and a rollout gives a
            row. None: the model's own; if its order is step_first, block_first too.
        parts: stretches that a video is judged in.
        seeds: how many first blocks of each prompt to compare for the diversity, from ``seed`` on; 0: none.
        batch: videos made at once; it does not change them.
        execution: how the rollouts run, such as with keys or linear layers in 8 bits.
        on_videos: called with (videos done, videos in all) after every batch.

    Raises:
        ValueError: not a toy model, no prompt, an illegal length or number.
        FloatingPointError: latents that are not finite.
    """
    if model.world is None:
        raise ValueError(f"model {model.name!r} shows no toy world: nothing to measure")
    if not prompts or batch < 1:
        raise ValueError(f"need at least one prompt and a batch of at least 1, got {len(prompts)} and {batch}")
    if seeds == 1 or seeds < 0:
        raise ValueError(f"seeds must be 0 (no diversity) or at least 2, got {seeds}")
    if not num_frames:
        raise ValueError("num_frames must hold at least one length, got none")
    whole("parts", parts, least=1)
    for frames in num_frames:
        model.latent_frames(frames)
        if frames < parts:
            raise ValueError(f"parts must be at most the frames of a video, {frames}, got {parts}")
    rollouts = default_rollouts(model.rollout) if rollouts is None else rollouts
    oracle = ToyOracle(model.world)
    total, done = len(rollouts) * len(prompts) * (1 + seeds), 0
    rows: dict[tuple[int, int], EvaluationRow] = {}
    for number, rollout in enumerate(rollouts):
        readings: list[Reading] = []
        first_blocks: list[list[Reading]] = []  # of each seed
        runs = [(seed, max(num_frames), readings)]
        for other in range(seeds):
            first_blocks.append([])
            runs.append((seed + other, model.pixel_frames(rollout.frames_per_block), first_blocks[-1]))
        for key, frames, into in runs:
            for videos in _batches(len(prompts), batch):
                chosen = [prompts[i] for i in videos]
                clips = zip(_frames(model, rollout, execution, chosen, videos, key, frames), chosen, strict=True)
                into += [oracle.evaluate(clip, prompt) for clip, prompt in clips]
                done += len(videos)
                if on_videos is not None:
                    on_videos(done, total)
        diversity = Diversity.of(model.world, list(zip(*first_blocks, strict=True))) if seeds else None
        for frames in num_frames:
            cut = [reading.part(0, frames) for reading in readings]
            rows[frames, number] = EvaluationRow(
                rollout=rollout,
                num_frames=frames,
                videos=len(prompts),
                whole=Summary.of(cut),
                parts=tuple(map(Summary.of, zip(*(reading.parts(parts) for reading in cut), strict=True))),
                **steady_cost(Plan.of(rollout)),
                diversity=diversity,
            )
    return [rows[frames, number] for frames in num_frames for number in range(len(rollouts))]


def draw_rows(rows: Sequence[EvaluationRow], picture: str | os.PathLike[str]) -> None:
    """Draw the share of valid frames, and of frames of the right colour, by stretches of the video into a .png: a panel
    for each length, a line for each rollout."""
    lengths = list(dict.fromkeys(row.num_frames for row in rows))
    panels = []
    for frames in lengths:
        for label, name in (("valid frames", "valid"), ("frames of the right colour", "colour")):
            lines = [
                Series(
                    order,
                    range(1, 1 + len(row.parts)),
                    [100 * getattr(p, name) for p in row.parts],
                    ORDER_COLOURS[order],
                )
                for row, order in ((row, row.rollout.order) for row in rows)
                if row.num_frames == frames
            ]
            about = f"{label}, %, of {rows[0].videos} videos of {frames} frames"
            stretch = f"{ordinal(len(rows[0].parts))} of the video"
            panels.append(Lines(about, lines, stretch, y_range=(0.0, 100.0), points=True))
    save_plot(panels, picture)


def default_rollouts(rollout: RolloutConfig) -> tuple[RolloutConfig, ...]:
    """The model's own; a model trained for step_first, and so for every order, is compared with block_first too."""
    return (rollout, rollout.with_order("block_first")) if rollout.order == "step_first" else (rollout,)


def steady_cost(plan: Plan) -> dict[str, float]:
    """Forwards of a block, and the frames that one of them sees on average, far from both ends of a video. Without a
    window a block sees ever more: then of the eighth block."""
    reach = max(8 * plan.frames_per_block if window is None else window for window in plan.window_frames)
    block = -(-reach // plan.frames_per_block)
    cached = [step for step in range(plan.steps) if plan.has_cache(step, block)]
    seen = [plan.visible_frames(step, block) for step in (*range(plan.steps), *cached)]
    return {"forwards": len(seen), "visible_frames": sum(seen) / len(seen)}


def _batches(count: int, batch: int) -> Iterator[range]:
    for first in range(0, count, batch):
        yield range(first, min(first + batch, count))


def _frames(
    model: VideoModel,
    config: RolloutConfig,
    execution: ExecutionConfig | None,
    prompts: Sequence[ToyPrompt],
    videos: Sequence[int],
    seed: int,
    num_frames: int,
) -> Iterator[Tensor]:
    """The videos of one batch, uint8 [num_frames, H, W, 3] each."""
    rollout = Rollout(
        model.transformer,
        torch.cat([model.encode_text(prompt.text()) for prompt in prompts]),
        config,
        execution,
        num_latent_frames=model.latent_frames(num_frames),
        latent_size=model.latent_size[1:],
        seed=seed,
        video_ids=videos,
    )
    latents = torch.cat([block.latents.cpu() for block in rollout], dim=1)
    for video in latents.split(1):
        yield torch.from_numpy(model.decoder().decode(video))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
