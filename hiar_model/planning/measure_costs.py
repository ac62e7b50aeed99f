"""Seconds of the tasks, measured where they will run: a pipeline divides its steps by them."""

from __future__ import annotations

import time
from statistics import fmean

import torch
from torch import Tensor

from ..config import ExecutionConfig, RolloutConfig
from ..models.transformer import HiARTransformer
from ..rollout.engine import Rollout
from ..schedule.costs import Costs, Curve


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
    """Seconds of a denoise and a cache task over the frames they see, means of a short rollout for each window.

    Args:
        prompt_embeds: [B or 1, L, text_dim]. config: of the video; its windows are what is measured. execution: its
            ``cuda_graph`` and ``kv_dtype`` count.
        num_latent_frames: of the video; None: endless. latent_size: (height, width) of a latent frame.
        batch: videos at once. repeats: blocks that are timed once the window is full. fused: time fused tasks too, at
            the widest window.
    """
    execution = execution or ExecutionConfig()
    execution = ExecutionConfig(cuda_graph=execution.cuda_graph, kv_dtype=execution.kv_dtype)
    block, sink = config.frames_per_block, config.sink_frames
    total = None if num_latent_frames is None else -(-num_latent_frames // block) * block
    windows = {min(w or total or 0, total or w or 0) for w in config.windows} | {sink + 2 * block}

    def times(window: int, fuse: bool = False) -> dict[str, float]:
        """Kind of task, or "fused" -> seconds, with the window full."""
        growth = -(-window // block)
        rollout = Rollout(
            model, prompt_embeds,
            RolloutConfig(
                (1000.0,), order="stream", frames_per_block=block, window_frames=max(window, sink + block + 1),
                sink_frames=sink, fuse_cache_denoise=fuse,
            ),
            execution, num_latent_frames=(growth + 2 + repeats) * block, latent_size=latent_size,
            video_ids=range(batch),
        )  # fmt: skip
        seconds: dict[str, list[float]] = {}
        for group in rollout.groups():
            task, begun = group[0][-1], _now(device)
            rollout.step()
            if task.block > growth:  # what is met for the first time is compiled or captured
                seconds.setdefault("fused" if len(group[0]) == 2 else task.kind, []).append(_now(device) - begun)
        return {kind: fmean(each) for kind, each in seconds.items()}  # a video takes their sum

    device = model.patch_embedding.weight.device
    measured = {window: times(window) for window in windows}
    denoise, cache = (Curve(tuple((w, measured[w][kind]) for w in sorted(measured))) for kind in ("denoise", "cache"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    factor = 1.0
    if fused:
        widest = max(windows)
        factor = times(widest, True)["fused"] / (measured[widest]["denoise"] + measured[widest]["cache"])
    how = "CUDA graphs" if execution.cuda_graph else "eager"
    return Costs(denoise, cache, pair=factor, source=f"tasks measured on {name}, {batch} at once, {how}")


def _now(device: torch.device) -> float:
    """time.perf_counter() after a device synchronisation."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
