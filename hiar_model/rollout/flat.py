"""The function `hiar_model.rollout`: one call with plain keywords, over :class:`Rollout` and its two configs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.checks import one_of, whole
from ..config import ExecutionConfig, FlowSchedule, RolloutConfig
from ..distributed.mesh import make_mesh
from ..distributed.pipeline import init_distributed
from ..schedule.plan import Plan
from .engine import FinishedBlock, Rollout
from .executor import NoiseSource
from .noise import INITIAL, KeyedNoise, TensorNoise
from .shapes import require_shape

EXECUTORS = ("eager", "graph", "pipeline", "pipeline-graph")


def make_rollout(
    model: Any,
    text: Tensor | Callable[[int], Tensor],
    schedule: FlowSchedule,
    *,
    num_frames: int | None,
    height: int,
    width: int,
    batch: int = 1,
    order: str = "step_first",
    frames_per_block: int = 3,
    window_frames: int | None | Sequence[int | None] = None,
    sink_frames: int = 0,
    trajectory: str = "sde",
    renoise: NoiseSource | None = None,
    noise: Tensor | None = None,
    prefix: Tensor | None = None,
    first_frame: int = 0,
    seed: int = 0,
    video_ids: Sequence[int] | None = None,
    context_noise: float = 0.0,
    cache_source: str = "own",
    pairs: bool = False,
    executor: str = "eager",
    parallel: str | None = None,
    mesh: Any = None,
    on_new_text: str = "keep",
    cache_dtype: torch.dtype | None = None,
    keep_frames: bool = False,
    on_visit: Callable[[int, int | None], None] | None = None,
    on_boundary: Callable[[int], None] | None = None,
    **execution: Any,
) -> Rollout:
    """A :class:`Rollout` from plain keywords; arguments as for :func:`rollout`."""
    one_of("executor", executor, EXECUTORS)
    batch = whole("batch", batch, 1)
    config = RolloutConfig(
        schedule.steps, schedule.shift, order, frames_per_block, window_frames, sink_frames, cache_source, pairs,  # type: ignore[arg-type]
        trajectory, context_noise, on_new_text, first_frame,
    )  # fmt: skip
    ids = list(range(batch)) if video_ids is None else [whole("video_ids", n) for n in video_ids]
    require_shape("video_ids", (len(ids),), (batch,))
    if parallel is not None:
        one_of("parallel", parallel, ("ulysses",))
    pipelined, split = executor.startswith("pipeline"), execution.get("steps_per_rank")
    if mesh is None and parallel is not None:
        if pipelined:
            raise ValueError(f"executor={executor!r} with parallel={parallel!r} needs a mesh: see make_mesh")
        mesh = make_mesh(head=init_distributed())
    if mesh is None and pipelined and (split is None or len(split) > 1) and (world := init_distributed()) > 1:
        mesh = make_mesh(step=world)
    if pipelined and mesh is None and split is None:
        execution = {"steps_per_rank": (len(schedule),), **execution}
    sources: Any = noise
    if renoise is not None:
        weight = model if hasattr(model, "config") else next(filter(None, model))
        size = (weight.config.in_channels, height, width)
        ahead = 0 if prefix is None else prefix.shape[1]
        if noise is not None:
            require_shape("noise", noise, (batch, None if num_frames is None else num_frames - ahead, *size))
        sources = _sources(Plan.of(config, ahead), noise, renoise, seed, ids, size)
    video = Rollout(
        model,
        text,
        config,
        ExecutionConfig(
            cuda_graph=executor.endswith("graph"), mesh=mesh, kv_dtype=cache_dtype, keep_all_frames=keep_frames,  # type: ignore[arg-type]
            **execution,
        ),
        num_latent_frames=num_frames,
        latent_size=(height, width),
        seed=seed,
        prefix=prefix,
        video_ids=ids,
        noise=sources,
    )  # fmt: skip
    video.on_task, video.on_boundary = on_visit, on_boundary
    return video


def _sources(
    plan: Plan, initial: Tensor | None, renoise: NoiseSource, seed: int, ids: Sequence[int], size: tuple[int, int, int]
) -> NoiseSource:
    """Initial noise from a tensor or keyed, the noise of the steps from ``renoise``."""
    first: NoiseSource = KeyedNoise(seed, ids, plan.block_frames, size)
    if initial is not None:
        first = TensorNoise(initial, plan.block_frames, plan.prefix_frames)
    return lambda step, block: first(step, block) if step == INITIAL else renoise(step, block)


def rollout(
    model: Any,
    noise: Tensor | None,
    text: Tensor | Callable[[int], Tensor],
    schedule: FlowSchedule,
    *,
    on_block: Callable[[FinishedBlock], None] | None = None,
    **keywords: Any,
) -> Tensor | None:
    """Latents of a whole video [B, F, C, H, W], prefix included.

    Args:
        model: as for :class:`Rollout`; text: its prompt_embeds. schedule: noise levels of the S steps.
        noise: initial noise [B, F, C, H, W] of the new frames; None: keyed by (seed, video, step, block), which needs
            ``num_frames``, ``height``, ``width`` of the latents (and ``batch``).
        on_block: called with each :class:`FinishedBlock`.
        keywords: order, frames_per_block, window_frames, sink_frames, context_noise, first_frame of
            :class:`~hiar_model.RolloutConfig`; trajectory, cache_source, pairs, on_new_text: its sampler, kv_source,
            fuse_cache_denoise, on_prompt_change. seed, prefix, video_ids of :class:`Rollout`; renoise: a callable
            (step, block) -> [B, frames, C, H, W]. executor: "eager", "graph" (CUDA graphs), "pipeline" or
            "pipeline-graph" (the job's processes share the steps); parallel="ulysses": they share every forward; mesh,
            cache_dtype, keep_frames, and the others of :class:`~hiar_model.ExecutionConfig`.

    Returns:
        None on all ranks of a pipeline but the last, which has the finished blocks.

    Example:
        >>> import torch
        >>> from hiar_model import FlowSchedule, HiARTransformer, WanConfig, rollout
        >>> model = HiARTransformer(WanConfig(16, 32, 2, 2, text_dim=6, text_len=5, in_channels=4, out_channels=4))
        >>> rollout(model, torch.randn(1, 6, 4, 4, 8), torch.randn(1, 5, 6), FlowSchedule()).shape
        torch.Size([1, 6, 4, 4, 8])
    """
    prefix = keywords.get("prefix")
    for name, latents in (("noise", noise), ("prefix", prefix)):
        if latents is not None:
            require_shape(name, latents, (None,) * 5)
    if noise is not None:
        frames, size = noise.shape[1], {"batch": noise.shape[0], "height": noise.shape[3], "width": noise.shape[4]}
        keywords = {"num_frames": frames + (0 if prefix is None else prefix.shape[1]), **size, **keywords}
    blocks = [] if prefix is None else [prefix]
    video = make_rollout(model, text, schedule, noise=noise, **keywords)
    for block in video:
        blocks.append(block.latents)
        if on_block is not None:
            on_block(block)
    if not video.makes_blocks:
        return None
    return torch.cat([latents.to(blocks[-1]) for latents in blocks], dim=1)
