"""How much of their prompts, and of their own beginnings, a toy model's videos keep: read back from pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..common.settings import own_settings
from ..models.registry import VideoModel
from ..rollout import Rollout
from ..schedule.plan import Plan, windows_per_step
from ..toy.oracle import ToyOracle
from ..toy.prompt import ToyPrompt
from ..toy.reading import Reading, Summary
from .diversity import Diversity

PARTS = 6
"""A video is judged as a whole and in so many stretches if nothing is said, so that a decline over time shows."""

Windows = int | None | Sequence[int | None] | Literal["model"]


@dataclass(frozen=True)
class EvaluationRow:
    """One order at one length: means over all videos, as a whole (``whole``) and stretch by stretch (``parts``).

    forwards, visible_frames  of a block once the window is full: forwards of the network, and latent frames that one of
                              them sees on average, its own among them
    diversity                 None if it was not measured; it is one for all lengths of an order
    """

    order: str
    cache_source: str
    window_frames: tuple[int | None, ...]  # per step
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
        """Plain mapping for JSON; a figure that could not be measured is None."""
        return _plain({**asdict(self), "drift": self.drift})


@own_settings()
def evaluate_toy(
    model: VideoModel,
    prompts: Sequence[ToyPrompt],
    *,
    seed: int = 0,
    num_frames: Sequence[int],
    order: Sequence[str] | None = None,
    cache_source: str | None = None,
    window_frames: Windows = "model",
    parts: int = PARTS,
    seeds: int = 0,
    batch: int = 16,
    on_videos: Callable[[int, int], None] | None = None,
) -> list[EvaluationRow]:
    """Make a video of every prompt, at each length in each order, and read it.

    Context is causal and noise belongs to (video, step, block): the first frames of a video are the shorter video, so
    one rollout of the greatest length serves all.

    Args:
        model: a toy model. prompts: one video each, with noise of its own (video i of ``seed``).
        num_frames, order: the lengths in pixel frames and the orders to measure; every pair gives a row. No order: the
            model's own, or step_first and block_first where it names none.
        cache_source, window_frames: other than the model's own, as for :class:`Rollout`.
        parts: stretches that a video is judged in.
        seeds: how many first blocks of each prompt to compare for the diversity, from ``seed`` on; 0: none.
        batch: videos made at once; it does not change them.
        on_videos: called with (videos done, videos in all) after every batch.

    Raises:
        ValueError: no toy model, no prompt, an illegal length, order, source, window or number.
        FloatingPointError: latents that are not finite.
    """
    if model.world is None:
        raise ValueError(f"model {model.name!r} shows no toy world: nothing to measure")
    if not prompts or batch < 1:
        raise ValueError(f"need at least one prompt and a batch of at least 1, got {len(prompts)} and {batch}")
    if seeds == 1 or seeds < 0:
        raise ValueError(f"seeds must be 0 (no diversity) or at least 2, got {seeds}")
    if not num_frames or parts < 1:
        raise ValueError(f"need at least one length and one part, got {list(num_frames)} and {parts}")
    for frames in num_frames:
        model.latent_frames(frames)
        if frames < parts:
            raise ValueError(f"a video is judged in {parts} stretches: at least {parts} frames, got {frames}")
    if order is None:
        order = ("step_first", "block_first") if model.order is None else (model.order,)
    forms = [_form(model, name, cache_source, window_frames) for name in order]
    oracle = ToyOracle(model.world)
    total, done = len(forms) * len(prompts) * (1 + seeds), 0
    rows: dict[tuple[int, str], EvaluationRow] = {}
    for form in forms:
        readings: list[Reading] = []
        blocks: list[list[Reading]] = []  # first ones, of each seed
        runs = [(seed, max(num_frames), readings)]
        for other in range(seeds):
            blocks.append([])
            runs.append((seed + other, model.pixel_frames(model.frames_per_block), blocks[-1]))
        for key, frames, into in runs:
            for videos in _batches(len(prompts), batch):
                chosen = [prompts[i] for i in videos]
                clips = zip(_frames(model, form, chosen, videos, key, frames), chosen, strict=True)
                into += [oracle.evaluate(clip, prompt) for clip, prompt in clips]
                done += len(videos)
                if on_videos is not None:
                    on_videos(done, total)
        diversity = Diversity.of(model.world, list(zip(*blocks, strict=True))) if seeds else None
        for frames in num_frames:
            cut = [reading.part(0, frames) for reading in readings]
            rows[frames, form.order] = EvaluationRow(
                order=form.order,
                cache_source=form.cache_source,
                window_frames=form.window_frames,
                num_frames=frames,
                videos=len(prompts),
                whole=Summary.of(cut),
                parts=tuple(map(Summary.of, zip(*(reading.parts(parts) for reading in cut), strict=True))),
                **_steady_cost(form),
                diversity=diversity,
            )
    return [rows[frames, form.order] for frames in num_frames for form in forms]


def _form(model: VideoModel, order: str, cache_source: str | None, window_frames: Windows) -> Plan:
    """What is visited; ValueError if it does not fit together."""
    windows = model.window_frames if window_frames == "model" else window_frames
    return Plan(
        len(model.schedule),
        order,
        model.frames_per_block,
        window_frames=windows_per_step(windows, len(model.schedule)),
        sink_frames=model.sink_frames,
        cache_source=model.cache_source if cache_source is None else cache_source,
    )


def _steady_cost(plan: Plan) -> dict[str, float]:
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
    model: VideoModel, form: Plan, prompts: Sequence[ToyPrompt], videos: Sequence[int], seed: int, num_frames: int
) -> Iterator[Tensor]:
    """The videos of one batch, uint8 [num_frames, H, W, 3] each."""
    _, height, width = model.latent_size
    rollout = Rollout(
        model.transformer,
        torch.cat([model.encode_text(prompt.text()) for prompt in prompts]),
        model.schedule,
        num_frames=model.latent_frames(num_frames),
        height=height,
        width=width,
        batch=len(prompts),
        order=form.order,
        frames_per_block=form.frames_per_block,
        window_frames=form.window_frames,
        sink_frames=form.sink_frames,
        cache_source=form.cache_source,
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
