"""HiAR: long video by hierarchical denoising. Nothing is imported until its name is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import rollout, train
    from .bundle import load_video_model
    from .checkpoint import load_transformer, save_transformer
    from .config import WanConfig
    from .generation import generate, stream
    from .infill import infill
    from .rollout import Rollout
    from .schedule import FlowSchedule
    from .script import Script
    from .sessions import load_session, save_session
    from .text import WanTextEncoder
    from .transformer import HiARTransformer
    from .video import Video
    from .video_model import VideoModel

__all__ = [
    "WanConfig",
    "HiARTransformer",
    "load_transformer",
    "save_transformer",
    "FlowSchedule",
    "Rollout",
    "rollout",
    "Video",
    "VideoModel",
    "generate",
    "load_video_model",
    "stream",
    "Script",
    "infill",
    "save_session",
    "load_session",
    "WanTextEncoder",
    "train",
]

_HOME = {
    "WanConfig": "config",
    "HiARTransformer": "transformer",
    "load_transformer": "checkpoint",
    "save_transformer": "checkpoint",
    "FlowSchedule": "schedule",
    "Rollout": "rollout",
    "Video": "video",
    "VideoModel": "video_model",
    "load_video_model": "bundle",
    "generate": "generation",
    "stream": "generation",
    "Script": "script",
    "infill": "infill",
    "save_session": "sessions",
    "load_session": "sessions",
    "WanTextEncoder": "text",
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
