"""Whether the memory of another session is free, by prediction, before anything of it is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..config import ExecutionConfig
from ..models.video_model import VideoModel
from ..pipelines.video_pipeline import VideoOptions, rollout_config
from ..planning.fit import vae_config
from ..planning.memory import ComponentMemory, Request, predict, vae_memory
from ..schedule.plan import Plan
from .protocol import Refusal, StartMessage

RETRY_AFTER = 10
"""Seconds after which a client may try again where memory is short."""


@dataclass
class Admission:
    """Predicts the bytes of sessions of one model. free: free bytes of a device; None: unknown, all are admitted."""

    model: VideoModel
    execution: ExecutionConfig
    free: Callable[[Any], int | None]

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
            elif None not in (windows := Plan.of(config).window_frames):
                block, steps = config.frames_per_block, len(config.steps)
                if frames > max(windows) + block * (steps + 2):  # type: ignore[type-var,operator]
                    frames = None  # as much as an endless one, whose prediction is known; a new one takes a second
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
        pool, working = (memory.activations, 0) if memory.captured else (0, memory.activations)
        peak = memory.vae.peak  # on a GPU a block is decoded while the next one is made
        return memory.own + pool, working + peak if request.device == "cuda" else max(working, peak)

    @cached_property
    def _decoder(self) -> tuple[dict[str, Any], torch.dtype] | None:
        """Settings and dtype of the model's VAE; None: a toy's codec, which holds nothing."""
        if self.model.decoded_by is None:
            return None
        return vae_config(Path(self.model.options.get("vae", self.model.name))), self.model.decoder().dtype  # type: ignore[attr-defined]

    def _vae(self, request: Request) -> ComponentMemory:
        if self._decoder is None:
            return ComponentMemory()
        settings, dtype = self._decoder
        block = request.rollout.frames_per_block
        return vae_memory(settings, request.height, request.width, block, dtype, request.device)

    def admit(self, start: StartMessage, rewind_bytes: int, promised: int) -> int:
        """The bytes that a session may take, its states for rewinding among them.

        Args:
            promised: bytes that other sessions may still take.

        Raises:
            Refusal: "busy" with ``retry_after`` if they are not free.
        """
        resident, working = self.predicted(start)
        need = resident + min(rewind_bytes, 16 * resident)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()  # else the rings of sessions that ended would not count as free
        free = self.free(self.model.device)
        if free is not None and need + working + promised > free:
            raise Refusal(
                "busy",
                f"this video needs about {(need + working) / 1e6:.0f} MB, {max(free - promised, 0) / 1e6:.0f} MB are "
                "free for it",
                closes=True, retry_after=RETRY_AFTER,
            )  # fmt: skip
        return need
