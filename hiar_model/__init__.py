"""HiAR: long video by hierarchical denoising. Nothing is imported until its name is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import rollout, train
    from .config import ExecutionConfig, FlowSchedule, RolloutConfig, WanConfig
    from .io.video import Video
    from .models.checkpoint import load_transformer, save_transformer
    from .models.registry import load_video_model
    from .models.text_encoder import WanTextEncoder
    from .models.transformer import HiARTransformer
    from .models.video_model import VideoModel
    from .pipelines.compare import compare
    from .pipelines.prompt_schedule import PromptSchedule
    from .pipelines.video_pipeline import VideoPipeline, generate, stream
    from .rollout import Rollout
    from .rollout.infill import infill
    from .rollout.session_io import load_session, save_session
    from .rollout.together import step_together

__all__ = [
    "WanConfig",
    "RolloutConfig",
    "ExecutionConfig",
    "VideoPipeline",
    "HiARTransformer",
    "load_transformer",
    "save_transformer",
    "FlowSchedule",
    "Rollout",
    "rollout",
    "Video",
    "VideoModel",
    "generate",
    "compare",
    "load_video_model",
    "stream",
    "PromptSchedule",
    "infill",
    "step_together",
    "save_session",
    "load_session",
    "WanTextEncoder",
    "train",
]

_HOME = {
    "WanConfig": "config",
    "RolloutConfig": "config",
    "ExecutionConfig": "config",
    "VideoPipeline": "pipelines.video_pipeline",
    "HiARTransformer": "models.transformer",
    "load_transformer": "models.checkpoint",
    "save_transformer": "models.checkpoint",
    "FlowSchedule": "config",
    "Rollout": "rollout",
    "Video": "io.video",
    "VideoModel": "models.video_model",
    "load_video_model": "models.registry",
    "generate": "pipelines.video_pipeline",
    "compare": "pipelines.compare",
    "stream": "pipelines.video_pipeline",
    "PromptSchedule": "pipelines.prompt_schedule",
    "infill": "rollout.infill",
    "step_together": "rollout.together",
    "save_session": "rollout.session_io",
    "load_session": "rollout.session_io",
    "WanTextEncoder": "models.text_encoder",
}
"""Public name -> the module that holds it."""
_SUBPACKAGES = ("rollout", "train")  # rollout is callable as well: hiar_model.rollout(...)


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f".{name}", __name__)
    if name == "__version__":
        return import_module(".version", __name__).package_version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # next time without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
