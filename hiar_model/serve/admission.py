"""Whether the memory of another session is free, by prediction, before anything of it is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import ExecutionConfig
from ..models.video_model import VideoModel
from ..pipelines.video_pipeline import VideoOptions, rollout_config
from ..planning.fit import Subject, subject
from ..planning.memory import ComponentMemory, Request, predict, vae_memory
from .protocol import Refusal, StartMessage

RETRY_AFTER = 10
"""Seconds after which a client may try again where memory is short."""


@dataclass
class Admission:
    """Predicts the bytes of sessions of one model. free: free bytes of a device; None: unknown, all are admitted."""

    model: VideoModel
    execution: ExecutionConfig
    free: Callable[[Any], int | None]

    def __post_init__(self) -> None:
        self._subject: Subject | None = None

    def predicted(self, start: StartMessage) -> tuple[int, int]:
        """(bytes that the session holds, bytes that its tasks need on top while they run).

        Raises:
            Refusal: a video that the model cannot make.
        """
        try:
            options = VideoOptions(None, height=start.height, width=start.width, num_frames=start.num_frames,
                                   order=start.order)  # fmt: skip
            model = self.model.sized(start.height, start.width)
            config = rollout_config(model, options, blockwise=True)
            frames = None if start.num_frames is None else model.latent_frames(start.num_frames)
            if frames is None:
                config.require_endless("a video without num_frames")
        except ValueError as error:
            raise Refusal("bad_video", str(error)) from error
        kv, products = self.execution.kv_dtype, self.execution.attention_dtype
        _, height, width = model.latent_size
        request = Request(
            model.transformer.config, height, width, frames, config, dtype=model.dtype,
            kv_dtype=None if kv is None else getattr(torch, kv),
            attention_dtype=None if products is None else getattr(torch, products), device=model.device.type,
            cuda_graph=bool(self.execution.cuda_graph),
        )  # fmt: skip
        memory = replace(predict(request), vae=self._vae(request))
        return memory.own + (memory.activations if memory.captured else 0), memory.activations

    def _vae(self, request: Request) -> ComponentMemory:
        if self.model.world is not None:
            return ComponentMemory()  # a toy's codec holds nothing
        self._subject = self._subject or subject(self.model.name)
        if self._subject.vae is None:
            return ComponentMemory()
        block = request.rollout.frames_per_block
        return vae_memory(self._subject.vae, request.height, request.width, block, torch.bfloat16, request.device)

    def admit(self, start: StartMessage, rewind_bytes: int, promised: int) -> int:
        """The bytes that a session may take, its states for rewinding among them.

        Args:
            promised: bytes that other sessions may still take.

        Raises:
            Refusal: "busy" with ``retry_after`` if they are not free.
        """
        resident, working = self.predicted(start)
        need = resident + min(rewind_bytes, 16 * resident)
        free = self.free(self.model.device)
        if free is not None and need + working + promised > free:
            raise Refusal(
                "busy",
                f"this video needs about {(need + working) / 1e6:.0f} MB, {max(free - promised, 0) / 1e6:.0f} MB are "
                "free for it",
                closes=True, retry_after=RETRY_AFTER,
            )  # fmt: skip
        return need
