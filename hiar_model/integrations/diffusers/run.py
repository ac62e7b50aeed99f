"""One call of HiARPipeline: its rollout, decoded block by block; diffusers' callback, interrupt and progress bar."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.settings import own_settings
from ...config import ExecutionConfig, RolloutConfig
from ...io.video import Frames
from ...models.threads import cpu_threads, fitting_threads
from ...models.video_model import VideoModel
from ...pipelines.decode import Decoding
from ...rollout import Rollout
from ...rollout.noise import INITIAL, KeyedNoise, TensorNoise
from ...rollout.shapes import check_prompt_embeds, require_shape
from ...schedule.plan import Plan, Task
from .options import CALLBACK_INPUTS


@dataclass
class VideoRequest:
    """What is asked for, checked and encoded.

    prompt_embeds: [B or 1, L, text_dim]. seeds: one for all videos of the batch, or one for each.
    noise: initial noise [B, F, C, h, w], or None. prefix: latents [B, f, C, h, w] of the image, or None.
    picture: the image, uint8 [1, H, W, 3], or None. num_latent_frames: prefix included; None: endless.
    """

    config: RolloutConfig
    batch: int
    prompt_embeds: Tensor
    seeds: Sequence[int]
    num_latent_frames: int | None
    noise: Tensor | None = None
    prefix: Tensor | None = None
    picture: Frames | None = None


class PipelineRun:
    """One call. Iterate over :meth:`latents` or :meth:`frames` once.

    Args:
        pipeline: whose ``_interrupt``, ``_current_timestep``, ``_current_block`` and progress bar are used.
        callback: diffusers' ``callback_on_step_end``, or None. tensor_inputs: what it is handed.
    """

    def __init__(
        self,
        pipeline: Any,
        model: VideoModel,
        request: VideoRequest,
        execution: ExecutionConfig | None,
        callback: Callable[..., Any] | None,
        tensor_inputs: Sequence[str],
    ) -> None:
        self.pipeline, self.model, self.request = pipeline, model, request
        self.callback, self.tensor_inputs = callback, tensor_inputs
        self.prompt_embeds, self.threads = request.prompt_embeds, fitting_threads(model.transformer)
        config, prefix = request.config, request.prefix
        me = weakref.proxy(self)  # no reference cycle: a dropped run frees its caches at once
        self.rollout = Rollout(
            model.networks(len(config.steps)),
            self.prompt_embeds if callback is None else lambda block: me.prompt_embeds,
            config,
            execution,
            num_latent_frames=request.num_latent_frames,
            latent_size=model.latent_size[1:],
            seed=request.seeds[0],
            prefix=prefix,
            video_ids=range(request.batch),
            noise=request.noise if len(request.seeds) == 1 else self._noise_of_seeds(prefix),
        )
        self.rollout.on_denoised = lambda task, x: me._denoised(task, x)
        self.rollout.on_task = lambda done, total: me._after_tasks()
        self.progress: Any = None

    def _noise_of_seeds(self, prefix: Tensor | None) -> Callable[[int, int], Tensor]:
        """All noise of a batch in which each video has its own seed: that of its video alone."""
        prefix_frames, noise = 0 if prefix is None else prefix.shape[1], self.request.noise
        frames = Plan.of(self.request.config, prefix_frames).block_frames
        keyed = [KeyedNoise(seed, [0], frames, self.model.latent_size) for seed in self.request.seeds]
        initial = None if noise is None else TensorNoise(noise, frames, prefix_frames)

        def draw(step: int, block: int) -> Tensor:
            if step == INITIAL and initial is not None:
                return initial(step, block)
            return torch.cat([one(step, block) for one in keyed])

        return draw

    def latents(self) -> Iterator[tuple[int, Tensor]]:
        """(block, latents [B, f, C, h, w]) of finished blocks, until the end or an interrupt."""
        blocks, steps = self.rollout.num_blocks, len(self.request.config.steps)
        new = None if blocks is None else blocks - self.rollout.plan.prefix_blocks
        bar = self.pipeline.progress_bar
        with bar(iterable=iter(())) if new is None else bar(total=new * steps) as self.progress:
            finished = iter(self.rollout)
            while True:
                with own_settings(), cpu_threads(self.threads):
                    try:
                        block = next(finished, None)
                    except _Interrupted:
                        return
                if block is None:
                    return
                yield block.block, block.latents

    def frames(self, blocks: Iterable[tuple[int, Tensor]]) -> Iterator[Frames]:
        """Decode blocks: uint8 [B, f, H, W, 3] each; the image, if any, comes first."""
        batch, prefix, picture = self.request.batch, self.request.prefix, self.request.picture
        with own_settings():
            decodings = [Decoding(self.model.decoder()) for _ in range(batch)]
        if prefix is not None and picture is not None:
            for i, decoding in enumerate(decodings):
                with own_settings():
                    decoding.skip(prefix[i : i + 1])
            yield np.stack([picture] * batch)

        def together(of: Callable[[int, Decoding], Iterable[tuple[int, Frames]]]) -> Iterator[Frames]:
            with own_settings(), cpu_threads(self.threads):
                pieces = [list(of(i, decoding)) for i, decoding in enumerate(decodings)]
            for piece in zip(*pieces, strict=True):
                yield np.stack([frames for _, frames in piece])

        for block, latents in blocks:
            yield from together(lambda i, decoding: decoding.put(block, latents[i : i + 1]))  # noqa: B023
        yield from together(lambda i, decoding: decoding.flush())

    def _denoised(self, task: Task, x: Tensor) -> None:
        """After a denoise task; ``x`` [B, f, C, h, w] may be changed."""
        timestep = self.request.config.schedule.timesteps[task.step]
        self.pipeline._current_timestep = torch.tensor(timestep)
        self.pipeline._current_block = task.block
        self.progress.update()
        if self.callback is None:
            return
        values = {"latents": x.transpose(1, 2), "prompt_embeds": self.prompt_embeds}
        handed = {name: values[name].clone() for name in self.tensor_inputs}
        returned = self.callback(self.pipeline, task.step, self.pipeline._current_timestep, handed)
        if returned is None:
            return
        if not isinstance(returned, Mapping):
            kind = type(returned).__name__
            raise ValueError(f"callback_on_step_end must return a mapping of {', '.join(CALLBACK_INPUTS)}, got {kind}")
        if "latents" in returned:
            require_shape("latents from callback_on_step_end", returned["latents"], tuple(values["latents"].shape))
            x.copy_(returned["latents"].transpose(1, 2))
        if "prompt_embeds" in returned:
            new, name = returned["prompt_embeds"], "prompt_embeds from callback_on_step_end"
            check_prompt_embeds(new, self.request.batch, self.model.transformer.config, name)
            new = new.to(x.device, self.model.dtype)
            if not torch.equal(new, self.prompt_embeds):
                self.prompt_embeds = new

    def _after_tasks(self) -> None:
        if self.pipeline.interrupt:
            raise _Interrupted


class _Interrupted(Exception):
    """``pipeline._interrupt`` was set."""
