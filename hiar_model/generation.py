"""Prompt to video: `generate` makes a whole one, `stream` yields its blocks as they come."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hiar_kernels.nvtx import span

from .bundle import Decoder, VideoModel, load_video_model, pick_device, pick_dtype
from .rollout import FinishedBlock, PipelineOptions, Rollout
from .rollout.checkpoints import RunFolder
from .rollout.visits import ORDERS
from .schedule import FlowSchedule
from .script import Script, Show, prompt_delay
from .sessions import load_session, save_session
from .version import versions
from .video import Frames, Video, check_fps

Window = int | Sequence[int | None] | None | Literal["model"]
Progress = Callable[[int, int | None, int, int | None], None]
"""Called with (pixel frames done, in all, forwards done, in all); "in all" is None for an endless video."""


class Generation:
    """One checked request: every mistake is found here, before work starts. Iterate once for the frames.

    Args: as for :func:`generate`; ``endless`` makes ``num_frames`` None mean a video without an end; ``executor``,
    ``pipeline``, ``parallel``, ``pairs``, ``on_nan`` and ``on_new_text`` as for :class:`Rollout`. With a pipeline
    finished blocks, and every ``checkpoint_every`` of them the states of all ranks, are kept in the folder ``keep``,
    and ``resume`` goes on with those of an interrupted run.

    ``prompts`` change on the way (:class:`hiar_model.script.Script`); ``prompt`` is then that of the time before the
    script's first line, or None. ``session`` is a file of :meth:`save_session` to go on from: frames come from there
    on; with another prompt it is a fork, which shows it from the first block that had not begun.

    Raises:
        ValueError: one line that names what is wrong and what would be right.
    """

    def __init__(
        self,
        prompt: str | None,
        *,
        model: str | os.PathLike[str] | VideoModel = "toy",
        num_frames: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        order: str = "step_first",
        window_frames: Window = "model",
        sink_frames: int | None = None,
        fps: float | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        endless: bool = False,
        executor: str = "eager",
        pipeline: PipelineOptions | None = None,
        parallel: str | None = None,
        pairs: bool | str = False,
        keep: str | os.PathLike[str] | None = None,
        resume: bool = False,
        checkpoint_every: int = 10,
        prompts: Script | None = None,
        on_new_text: str = "keep",
        on_nan: str = "stop",
        session: str | os.PathLike[str] | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        _check(num_frames=num_frames, seed=seed, steps=steps, order=order, sink_frames=sink_frames, fps=fps)
        endless = endless and num_frames is None
        if endless and order == "step_first":
            others = ", ".join(name for name in ORDERS if name != "step_first")
            raise ValueError(f"order step_first cannot make an endless video: give num_frames, or use {others}")
        self.model = _load(model, device, dtype)
        self.num_frames = None if endless else num_frames or self.model.num_frames
        self.schedule = self.model.schedule if steps is None else FlowSchedule.uniform(steps, self.model.schedule.shift)
        self.fps = float(self.model.fps if fps is None else fps)
        window = self._window(window_frames, endless)
        sink = self.model.sink_frames if sink_frames is None else sink_frames
        self.show: Show | None = None
        text = self._text(prompt, prompts)
        _, height, width = self.model.latent_size
        self.rollout = Rollout(
            self.model.transformer,
            text,
            self.schedule,
            num_frames=None if self.num_frames is None else self.model.latent_frames(self.num_frames),
            height=height,
            width=width,
            order=order,
            frames_per_block=self.model.frames_per_block,
            window_frames=window,
            sink_frames=sink,
            seed=seed,
            executor=executor,
            pipeline=pipeline,
            parallel=parallel,
            pairs=pairs,
            on_new_text=on_new_text,
            on_nan=on_nan,
            on_visit=None if on_progress is None else self._visited,
            on_boundary=self._boundary,
        )
        self.on_progress, self.frames_done = on_progress, 0
        self.on_new_text = on_new_text
        self.metadata = self._describe(prompt, seed, steps, order, window, sink)
        self.kept = None if keep is None else self._keep(keep, resume, checkpoint_every)
        self.decoder: Decoder | None = None
        self.session = session
        if session is not None and keep is not None:
            raise ValueError(f"session={os.fspath(session)!r} is of one process, a pipeline keeps its own: give one")

    @property
    def shows(self) -> bool:
        """Whether frames come in this process: the last one of a pipeline, the first of those that share visits, or
        the only one.
        """
        first = self.rollout.heads[0] == 0
        return first and (self.rollout.pipeline is None or not self.rollout.pipeline.stage.sends)

    def __iter__(self) -> Iterator[Frames]:
        """Frames of one block after the other, uint8 [f, H, W, 3].

        Raises:
            FloatingPointError: latents that are not finite, or frames that are all black: names step and block.
        """
        last_step = len(self.schedule) - 1
        decoder = self.decoder = self.model.decoder()
        if self.session is not None:
            found = load_session(self.session, self.rollout, decoder, {"weights_sha256": self.model.weights_sha256})
            self.frames_done = found.about["frames"]
        for block in self._blocks():
            if not self.shows:
                continue
            with span("decode", block.block):
                frames = decoder.decode(block.latents)
            first, self.frames_done = self.frames_done, self.frames_done + len(frames)
            if not frames.any():
                made = f"frames {first} to {self.frames_done - 1}"
                raise FloatingPointError(f"{made} came out all black: step {last_step}, block {block.block}")
            self._report(self.rollout.forwards_done)
            yield frames

    def save_session(self, path: str | os.PathLike[str]) -> Path:
        """Write a session, between two blocks: see :func:`hiar_model.sessions.save_session`."""
        if self.decoder is None:
            raise ValueError("a session begins with the first block: there is nothing to save yet")
        about = {"weights_sha256": self.model.weights_sha256, "frames": self.frames_done}
        return save_session(path, self.rollout, self.decoder, about)

    def told(self) -> list[str]:
        """What is to be said about prompts that change: from when on each shows, and what a live change would wait."""
        if self.show is None:
            return []
        plan, pipeline = self.rollout.plan, self.rollout.pipeline
        if plan.order == "step_first":
            return self.show.told()
        ranks = 1 if pipeline is None else len([n for n in pipeline.stage.split if n])
        return [*self.show.told(), str(prompt_delay(plan, ranks, self.on_new_text))]

    def _text(self, prompt: str | None, prompts: Script | None) -> Tensor | Show:
        """Of the one prompt, or of each block."""
        if prompts is None:
            return self.model.encode_text(prompt)  # type: ignore[arg-type]  # refuses None by name
        block, made = self.model.frames_per_block, self.num_frames

        def start(n: int) -> float:
            return (self.model.pixel_frames(n * block) if n else 0) / self.fps

        num_blocks = None if made is None else self.model.latent_frames(made) // block
        self.show = Show.encoded(prompts.from_start(prompt), self.model.encode_text, start, num_blocks)
        return self.show

    def _blocks(self) -> Iterator[FinishedBlock]:
        """Those that were kept of an interrupted run, then the rest as they come."""
        if self.kept is None:
            yield from self.rollout
            return
        known = self.kept.resume(self.rollout)
        for block in range(self.rollout.plan.prefix_blocks, known if self.shows else 0):
            yield self.kept.load_block(block)
        for finished in self.rollout:
            self.kept.save_block(finished)
            yield finished

    def _keep(self, folder: str | os.PathLike[str], resume: bool, every: int) -> RunFolder:
        pipeline = self.rollout.pipeline
        if pipeline is None:
            raise ValueError("blocks are kept, and runs resumed, in a pipeline only: give executor pipeline")
        names = ("prompt", "prompts", "weights_sha256", "num_frames", "seed", "timesteps", "frames_per_block",
                 "window_frames", "sink_frames", "dtype")  # fmt: skip
        about = {name: self.metadata[name] for name in names} | {"steps_per_rank": list(pipeline.stage.split)}
        return RunFolder(folder, about, resume=resume, every=every, group=pipeline.group)

    def _boundary(self, block: int) -> None:
        if self.kept is not None:
            self.kept.boundary(self.rollout, block)

    def _window(self, asked: Window, endless: bool) -> int | tuple[int | None, ...] | None:
        """The window in use: one number, one per step, or None for all earlier frames."""
        window = self.model.window_frames if asked == "model" else asked
        if isinstance(window, str):
            raise ValueError(f'window_frames must be a number, one per step, None (all) or "model", got {window!r}')
        if window is None or isinstance(window, int):
            windows: tuple[int | None, ...] = (window,)
        else:
            window = windows = tuple(window)
            if len(windows) != len(self.schedule):
                steps = len(self.schedule)
                raise ValueError(f"window_frames has {len(windows)} numbers, give one for each of {steps} steps")
        if endless and None in windows:
            raise ValueError("an endless video needs a window: give window_frames")
        return window

    def _visited(self, done: int, total: int | None) -> None:
        self._report(done)

    def _report(self, forwards_done: int) -> None:
        if self.on_progress is not None:
            self.on_progress(self.frames_done, self.num_frames, forwards_done, self.rollout.forwards_total)

    def _describe(
        self, prompt: str | None, seed: int, steps: int | None, order: str, window: Any, sink: int
    ) -> dict[str, Any]:
        """What it takes to repeat the video, as JSON takes it."""
        model, device = self.model, self.model.device
        dtype = str(model.dtype).removeprefix("torch.")
        window = window if window is None or isinstance(window, int) else list(window)
        options = {
            "model": model.name,
            "num-frames": self.num_frames,
            "seed": seed,
            "steps": steps,
            "order": order,
            "window-frames": "null" if window is None else str(window),
            "sink-frames": sink,
            "fps": f"{self.fps:g}",
            "device": str(device),
            "dtype": dtype,
            "threads": torch.get_num_threads(),
        }
        command = ["hiar", "generate", *([] if prompt is None else [prompt])]
        prompts = None
        if self.show is not None:
            lines = self.show.script.lines
            prompts = [[line.seconds, line.prompt] for line in lines]
            prompt, options["prompts"] = lines[0].prompt, self.show.script.name
            options["on-new-text"] = self.on_new_text
        for name, value in options.items():
            command += [] if value is None else [f"--{name}", str(value)]
        return {
            "prompt": prompt,
            "prompts": prompts,
            "model": model.name,
            "weights_sha256": model.weights_sha256,
            "num_frames": self.num_frames,
            "seed": seed,
            "steps": len(self.schedule),
            "timesteps": list(self.schedule.timesteps),
            "order": order,
            "frames_per_block": model.frames_per_block,
            "window_frames": window,
            "sink_frames": sink,
            "fps": self.fps,
            "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "numpy", "av"),
            "command": command,
        }


def generate(
    prompt: str,
    *,
    model: str | os.PathLike[str] | VideoModel = "toy",
    num_frames: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    order: str = "step_first",
    window_frames: Window = "model",
    sink_frames: int | None = None,
    fps: float | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    on_progress: Progress | None = None,
) -> Video:
    """A video of a prompt. The same arguments give the same video.

    Args:
        prompt: what to show; the toy model knows "a [small|large] COLOUR SHAPE moving DIRECTION [slowly|fast]".
        model: a shipped model's name, a folder, or a model that :func:`hiar_model.load_video_model` loaded.
        num_frames: pixel frames, whole blocks of them; None: what the model says.
        seed: of all noise.
        steps: denoising steps, spread evenly; None: the model's own.
        order: step_first, stream, wavefront (one result, other memory and speed) or block_first (clean context).
        window_frames: latent frames that a block sees, its own among them: a number, one per step, or None: all;
            "model": as trained.
        sink_frames: first frames that always stay visible, inside the window's number; None: the model's.
        fps: of the written video; None: the model's.
        device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "bfloat16", "float16" or "float64"; None: float32.
        on_progress: called with (frames done, in all, forwards done, in all) after every group of visits.

    Raises:
        ValueError: one line for whatever is wrong with the request, before work starts.
        FloatingPointError: not finite or all black, with step and block.
    """
    run = Generation(
        prompt,
        model=model,
        num_frames=num_frames,
        seed=seed,
        steps=steps,
        order=order,
        window_frames=window_frames,
        sink_frames=sink_frames,
        fps=fps,
        device=device,
        dtype=dtype,
        on_progress=on_progress,
    )
    with span("generate"):
        return Video(np.concatenate(list(run)), run.fps, run.metadata)


def stream(
    prompt: str,
    *,
    model: str | os.PathLike[str] | VideoModel = "toy",
    num_frames: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    order: str = "stream",
    window_frames: Window = "model",
    sink_frames: int | None = None,
    fps: float | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    on_progress: Progress | None = None,
) -> Iterator[Frames]:
    """The blocks of a video, uint8 [f, H, W, 3] each, as they come; ``num_frames`` None: without an end.

    The request is checked at the call, work starts with the first ``next``. Arguments and errors as for
    :func:`generate`; the order is "stream" unless said otherwise, since step_first shows nothing until nearly all is
    done and has no endless form.
    """
    return iter(
        Generation(
            prompt,
            model=model,
            num_frames=num_frames,
            seed=seed,
            steps=steps,
            order=order,
            endless=True,
            window_frames=window_frames,
            sink_frames=sink_frames,
            fps=fps,
            device=device,
            dtype=dtype,
            on_progress=on_progress,
        )
    )


def _check(
    *, num_frames: object, seed: object, steps: object, order: object, sink_frames: object, fps: float | None
) -> None:
    """What can be told without a model, so that nobody waits for one to hear it."""
    for name, value, least in (("num_frames", num_frames, 1), ("steps", steps, 1), ("sink_frames", sink_frames, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if fps is not None:
        check_fps(fps)


def _load(
    model: str | os.PathLike[str] | VideoModel, device: str | torch.device, dtype: str | torch.dtype | None
) -> VideoModel:
    if not isinstance(model, VideoModel):
        return load_video_model(model, device, dtype)
    if device != "auto" and pick_device(device) != model.device:
        raise ValueError(f"the model given is on {model.device}, not on {device}: load it there")
    if pick_dtype(dtype) not in (None, model.dtype):
        raise ValueError(f"the model given is in {model.dtype}, not in {dtype}: load it so")
    return model
