"""Times of visits, measured where they will run: what steps are shared out by."""

from __future__ import annotations

import time
from statistics import fmean

import torch
from torch import Tensor

from ..schedule import FlowSchedule
from ..transformer import HiARTransformer
from .costs import Costs, Curve
from .session import Rollout
from .visits import Plan, Visit


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
) -> Costs:
    """Seconds of a denoise and a cache visit over the frames they see, means of a short rollout for each window.

    Args:
        text: prompt [B or 1, L, text_dim]. plan: of the video; its windows are what is measured.
        num_frames: of the video; None: endless. height, width: of a latent frame. executor: "eager", "graph", ...
        repeats: blocks that are timed once the window is full.
    """
    block, sink = plan.frames_per_block, plan.sink_frames
    total = None if num_frames is None else -(-num_frames // block) * block
    windows = {min(w or total or 0, total or w or 0) for w in plan.window_frames} | {sink + 2 * block}
    found = {window: _times(model, text, plan, window, height, width, batch, executor, repeats) for window in windows}
    denoise, cache = (Curve(tuple((w, found[w][kind]) for w in sorted(found))) for kind in ("denoise", "cache"))
    device = model.patch_embedding.weight.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    return Costs(denoise, cache, source=f"visits measured on {name}, {batch} at once, executor {executor}")


def _times(
    model: HiARTransformer,
    text: Tensor,
    plan: Plan,
    window: int,
    height: int,
    width: int,
    batch: int,
    executor: str,
    repeats: int,
) -> dict[str, float]:
    """Kind of visit -> seconds, with the window full."""
    growth = -(-window // plan.frames_per_block)
    rollout = Rollout(
        model,
        text,
        FlowSchedule.uniform(1),
        num_frames=(growth + 2 + repeats) * plan.frames_per_block,
        height=height,
        width=width,
        batch=batch,
        order="stream",
        frames_per_block=plan.frames_per_block,
        window_frames=max(window, plan.sink_frames + plan.frames_per_block + 1),
        sink_frames=plan.sink_frames,
        executor=executor,
    )
    taken: dict[str, list[float]] = {"denoise": [], "cache": []}
    device = model.patch_embedding.weight.device
    for group in rollout.groups(rollout.num_blocks):
        visit: Visit = group[0][-1]
        begun = _now(device)
        rollout.executor.run(group)
        if visit.block > growth:  # what is met for the first time is compiled or captured
            taken[visit.kind].append(_now(device) - begun)
    return {kind: fmean(times) for kind, times in taken.items()}  # a video takes their sum


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
