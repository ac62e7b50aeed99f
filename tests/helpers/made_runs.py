"""Rollouts and videos of the tests, from plain keywords."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from recorder import recorded

from hiar_model import ExecutionConfig, Rollout, RolloutConfig
from hiar_model.planning.memory import Request
from hiar_model.rollout.flat import make_rollout as flat

if TYPE_CHECKING:
    from hiar_model.pipelines.video_pipeline import VideoRun

KEYWORDS = {"kv_source": "cache_source", "fuse_cache_denoise": "pairs", "on_prompt_change": "on_new_text",
            "sampler": "trajectory", "kv_dtype": "cache_dtype"}  # fmt: skip
"""Of RolloutConfig -> as hiar_model.rollout has always called it."""


def make_rollout(*args: Any, executor: str = "eager", **options: Any) -> Rollout:
    """:func:`hiar_model.rollout.flat.make_rollout`; executor="recorded": the stand-in for CUDA graphs."""
    for name, keyword in KEYWORDS.items():
        if name in options:
            options[keyword] = options.pop(name)
    with recorded() if executor.endswith("recorded") else nullcontext():
        return flat(*args, executor=executor.replace("recorded", "graph"), **options)


def prepare(
    prompt: str | None, *, model: Any = "toy", device: str = "auto", dtype: Any = None, endless: bool = False,
    execution: ExecutionConfig | None = None, **options: Any,
) -> VideoRun:  # fmt: skip
    """The run of one video."""
    from hiar_model.pipelines.video_pipeline import VideoOptions, VideoPipeline  # needs av, which GPU machines may lack

    pipeline = VideoPipeline(model, execution, device=device, dtype=dtype)
    return pipeline.prepare(VideoOptions(prompt, **options), blockwise=endless)


def make_request(*sizes: Any, steps: int = 4, **options: Any) -> Request:
    """A :class:`Request` of (config, height, width, num_frames) from plain keywords."""
    return changed(Request(*sizes, rollout=RolloutConfig().with_options(steps=steps)), **options)


def changed(request: Request, **options: Any) -> Request:
    """Another request: fields of it or of its rollout."""
    own = {f.name for f in fields(Request)}
    fields_of_rollout = {name: value for name, value in options.items() if name not in own}
    rollout = request.rollout.with_options(steps=fields_of_rollout.pop("steps", request.rollout.steps))
    return replace(
        request,
        rollout=replace(rollout, **fields_of_rollout),
        **{name: value for name, value in options.items() if name in own},
    )
