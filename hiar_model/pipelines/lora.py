"""LoRA of a pipeline: adapters beside the weights, and scales that change while a video runs."""

from __future__ import annotations

import os
from typing import Any

from ..common.lora_file import LoraFile, lora_scale
from ..models.lora import read_lora
from ..models.low_rank import Adapter
from ..models.video_model import VideoModel
from ..rollout import Rollout


class LoraLoading:
    """The part of :class:`hiar_model.VideoPipeline` about LoRA; it holds a model under ``model``."""

    model: Any
    _named: Any

    def load_lora(self, file: str | os.PathLike[str], scale: float = 1.0, *, name: str | None = None) -> str:
        """Add a LoRA beside the weights, whose scale :meth:`set_lora_scale` changes at any time; returns its name.

        Videos that are being made keep the adapters that they started with; the model that was handed in stays as it
        is. Merged adapters cost no time at all: ``load_video_model(..., lora=file)``.

        Args:
            file: a .safetensors, .pt or .pth file, or a folder with one; also "path:scale", as on the command line.
            scale: of the adapter; 1: as trained. name: for :meth:`set_lora_scale`; None: the file's, without suffix.

        Raises:
            ValueError: one line: what :func:`.read_lora` refuses, a name that is taken.

        Example:
            >>> from hiar_model import VideoPipeline
            >>> pipeline = VideoPipeline("toy", device="cpu")
            >>> pipeline.load_lora("missing.safetensors")
            Traceback (most recent call last):
            ValueError: missing.safetensors: no such file or folder
        """
        of = LoraFile.of(file if scale == 1.0 else (file, scale))
        if name is not None and (not isinstance(name, str) or not name):
            raise ValueError(f"name must be a string that is not empty, got {name!r}")
        model: VideoModel = self.model
        lora = read_lora(of.path, model.transformer.state_dict())
        name = lora.name if name is None else name
        old = () if model.adapters is None else model.adapters.adapters
        for other in old:
            if name == other.name:
                taken = f"name {name!r} is taken by {other.lora.path}"
                raise ValueError(f"{taken}: give name= another, or set_lora_scale of it")
        self._named = model.with_adapters([*old, Adapter(lora, name, of.scale)])
        del self.model  # cached
        return name

    def set_lora_scale(self, scale: float, name: str | None = None) -> None:
        """Change the scale of an adapter of :meth:`load_lora`, also while a video runs: it takes effect with the next
        group of tasks, without a new capture of graphs. Keys and values of earlier blocks stay as they are.

        Args:
            scale: 0 switches it off. name: of the adapter; None: the only one.

        Raises:
            ValueError: no such adapter; names those there are.
        """
        adapters = self.model.adapters
        known = {} if adapters is None else {adapter.name: adapter for adapter in adapters.adapters}
        if name is None and len(known) == 1:
            name = next(iter(known))
        if name not in known:
            there = ", ".join(known) or "none; load_lora adds one, and a merged one cannot change"
            raise ValueError(f"name must be that of a loaded LoRA ({there}), got {name!r}")
        known[name].scale = lora_scale("scale", scale)


class ScaleFollower:
    """Brings a rollout up to date with the scales of its model's adapters; call it between two groups of tasks.

    Args:
        model: of the video. rollout: at its start. metadata: of the video, where changes are recorded; no command
            repeats a video with changes.
    """

    def __init__(self, model: VideoModel, rollout: Rollout, metadata: dict[str, Any]) -> None:
        self.model, self.rollout, self.metadata = model, rollout, metadata
        self.scales = () if model.adapters is None else model.adapters.scales

    def __call__(self) -> None:
        """ValueError where several processes make the video: they would change at different tasks."""
        adapters, rollout = self.model.adapters, self.rollout
        if adapters is None or adapters.scales == self.scales:
            return
        if rollout.pipeline is not None or rollout.heads != (0, self.model.transformer.config.num_heads):
            raise ValueError("the scale of a LoRA cannot change while several processes make a video")
        adapters.write()
        rollout.weights_changed()
        self.scales = adapters.scales
        scales = {lora.name: lora.scale for lora in self.model.loras}
        self.metadata.setdefault("lora_changes", []).append({"block": rollout.blocks_done, "scales": scales})
        self.metadata.pop("command", None)
