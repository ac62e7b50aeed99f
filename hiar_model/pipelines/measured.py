"""Task costs measured before a video starts: they decide how a pipeline divides its steps and if it fuses tasks."""

from __future__ import annotations

from dataclasses import replace

from ..config import ExecutionConfig
from ..distributed.mesh import axis, axis_size
from ..models.video_model import VideoModel
from ..planning.measure_costs import measure_costs
from ..schedule.costs import Costs
from ..schedule.plan import Plan
from ..schedule.stages import faster_fusion
from .prompt_schedule import PromptSchedule
from .video_pipeline import VideoOptions, rollout_config


def measured(
    model: VideoModel, execution: ExecutionConfig, options: VideoOptions, *, choose_fusion: bool
) -> tuple[ExecutionConfig, VideoOptions]:
    """Both with the task costs measured by the first rank. Every rank of the mesh must call it.

    Args:
        choose_fusion: set ``fuse_cache_denoise`` to what is faster by these costs.
    """
    import torch.distributed as dist

    config = rollout_config(model, options).with_order("stream")
    ranks = axis_size(execution.mesh, "step")
    group = axis(execution.mesh, "step") if ranks > 1 else None
    frames = model.latent_frames(model.num_frames if options.num_frames is None else options.num_frames)
    costs: list[Costs | None] = [None]
    if group is None or dist.get_rank(group) == 0:
        prompts = options.prompts
        prompt = prompts.lines[0].prompt if isinstance(prompts, PromptSchedule) else options.prompt
        costs = [
            measure_costs(
                model.transformer, model.encode_text(prompt), config, execution, num_latent_frames=frames,  # type: ignore[arg-type]
                latent_size=model.latent_size[1:], fused=choose_fusion,
            )
        ]  # fmt: skip
    if group is not None:
        dist.broadcast_object_list(costs, group=group, group_src=0)  # all ranks must use the same numbers
    (result,) = costs
    assert result is not None
    if choose_fusion:
        working = ranks - execution.dedicated_decoder_rank
        split = [n for n in execution.steps_per_rank or () if n] or working
        plan = faster_fusion(Plan.of(config), frames // config.frames_per_block, split, result)
        options = replace(options, fuse_cache_denoise=plan.fuse_cache_denoise)
    return replace(execution, costs=result), options
