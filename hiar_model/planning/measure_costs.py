"""Measured task durations, by which a pipeline divides its steps."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from ..config import ExecutionConfig, RolloutConfig
from ..models.transformer import HiARTransformer
from ..rollout.engine import Rollout
from ..schedule.costs import CostCurve, Costs


def measure_costs(
    model: HiARTransformer,
    prompt_embeds: Tensor,
    config: RolloutConfig,
    execution: ExecutionConfig | None = None,
    *,
    num_latent_frames: int | None,
    latent_size: tuple[int, int],
    batch: int = 1,
    repeats: int = 4,
    fused: bool = False,
) -> Costs:
    """Mean seconds of a denoise and a cache task against the frames they see, from a short rollout for each window.

    Args:
        prompt_embeds: [B or 1, L, text_dim]. config: of the video; its windows are measured. execution: only
            ``cuda_graph``, ``kv_dtype``, ``attention_dtype``, ``linear_dtype`` and ``attention_impl`` are used.
        num_latent_frames: of the video; None: endless. latent_size: (height, width) of a latent frame.
        batch: videos at once. repeats: blocks timed with a full window. fused: also time fused tasks, at the widest
            window.
    """
    execution = execution or ExecutionConfig()
    execution = ExecutionConfig(
        cuda_graph=execution.cuda_graph,
        **execution.dtypes,
        attention_impl=execution.attention_impl,
    )
    block, narrowest = config.frames_per_block, config.least_window
    total = None if num_latent_frames is None else -(-num_latent_frames // block) * block
    windows = {min(w or total or 0, total or w or 0) for w in config.windows} | {narrowest + block}

    def times(window: int, fuse: bool = False) -> dict[str, float]:
        """Kind of task, or "fused" -> seconds, with a full window."""
        growth = -(-window // block)
        rollout = Rollout(
            model, prompt_embeds,
            replace(
                config, steps=(1000.0,), order="stream", window_frames=max(window, narrowest + 1), kv_source="own",
                on_prompt_change="keep", fuse_cache_denoise=fuse,
            ),
            execution, num_latent_frames=(growth + 2 + repeats) * block, latent_size=latent_size,
            video_ids=range(batch),
        )  # fmt: skip
        seconds: dict[str, list[float]] = {}
        for group in rollout.groups():
            task, start = group[0][-1], now(device)
            rollout.step()
            if task.block > growth:  # earlier forwards compile or capture
                seconds.setdefault("fused" if len(group[0]) == 2 else task.kind, []).append(now(device) - start)
        return {kind: fmean(each) for kind, each in seconds.items()}  # the mean, as a video takes their sum

    device = model.patch_embedding.weight.device
    measured = {window: times(window) for window in windows}

    def curve(kind: str) -> CostCurve:
        return CostCurve(tuple((window, measured[window][kind]) for window in sorted(measured)))

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    factor = 1.0
    if fused:
        widest = max(windows)
        factor = times(widest, True)["fused"] / (measured[widest]["denoise"] + measured[widest]["cache"])
    how = "CUDA graphs" if execution.cuda_graph else "eager"
    source = f"tasks measured on {name}, {batch} at once, {how}"
    return Costs(curve("denoise"), curve("cache"), fused=factor, source=source)


def now(device: torch.device) -> float:
    """time.perf_counter() after a device synchronisation."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
