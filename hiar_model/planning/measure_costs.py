"""Times of visits, measured where they will run: what steps are shared out by."""

from __future__ import annotations

import time
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..models.flow_schedule import FlowSchedule
from ..models.transformer import HiARTransformer
from ..rollout.engine import Rollout
from ..schedule.costs import Costs, Curve
from ..schedule.plan import Plan, Visit


def measure_costs(
    model: HiARTransformer,
    text: Tensor,
    plan: Plan,
    *,
    num_frames: int | None,
    height: int,
    width: int,
    batch: int = 1,
    executor: str = "eager",
    repeats: int = 4,
    pairs: bool = False,
    cache_dtype: torch.dtype | None = None,
) -> Costs:
    """Seconds of a denoise and a cache visit over the frames they see, means of a short rollout for each window.

    Args:
        text: prompt [B or 1, L, text_dim]. plan: of the video; its windows are what is measured.
        num_frames: of the video; None: endless. height, width: of a latent frame. executor: "eager", "graph", ...
        repeats: blocks that are timed once the window is full. pairs: time pairs too, at the widest window.
        cache_dtype: of :class:`Rollout`.
    """
    block, sink = plan.frames_per_block, plan.sink_frames
    total = None if num_frames is None else -(-num_frames // block) * block
    windows = {min(w or total or 0, total or w or 0) for w in plan.window_frames} | {sink + 2 * block}
    options: dict[str, Any] = {"height": height, "width": width, "batch": batch, "executor": executor}
    options["cache_dtype"] = cache_dtype
    found = {window: _times(model, text, plan, window, repeats, **options) for window in windows}
    denoise, cache = (Curve(tuple((w, found[w][kind]) for w in sorted(found))) for kind in ("denoise", "cache"))
    device = model.patch_embedding.weight.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    factor = 1.0
    if pairs:
        widest = max(windows)
        pair = _times(model, text, plan, widest, repeats, pairs=True, **options)["pair"]
        factor = pair / (found[widest]["denoise"] + found[widest]["cache"])
    source = f"visits measured on {name}, {batch} at once, executor {executor}"
    return Costs(denoise, cache, pair=factor, source=source)


def _times(
    model: HiARTransformer, text: Tensor, plan: Plan, window: int, repeats: int, **options: Any
) -> dict[str, float]:
    """Kind of visit, or "pair" -> seconds, with the window full."""
    growth = -(-window // plan.frames_per_block)
    rollout = Rollout(
        model,
        text,
        FlowSchedule.uniform(1),
        num_frames=(growth + 2 + repeats) * plan.frames_per_block,
        order="stream",
        frames_per_block=plan.frames_per_block,
        window_frames=max(window, plan.sink_frames + plan.frames_per_block + 1),
        sink_frames=plan.sink_frames,
        **options,
    )
    taken: dict[str, list[float]] = {}
    device = model.patch_embedding.weight.device
    for group in rollout.groups(rollout.num_blocks):
        visit: Visit = group[0][-1]
        begun = _now(device)
        rollout.executor.run(group)
        if visit.block > growth:  # what is met for the first time is compiled or captured
            taken.setdefault("pair" if len(group[0]) == 2 else visit.kind, []).append(_now(device) - begun)
    return {kind: fmean(times) for kind, times in taken.items()}  # a video takes their sum


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
