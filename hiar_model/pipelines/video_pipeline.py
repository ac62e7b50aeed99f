"""Prompt to video: `generate` makes a whole one, `stream` yields its blocks as they come."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hiar_kernels.nvtx import span

from ..common.checks import MOST_STEPS, MOST_THREADS, ORDERS, as_whole, one_of, path_like, whole
from ..common.settings import own_settings
from ..io.video import Frames, Video, check_fps
from ..models.flow_schedule import FlowSchedule
from ..models.registry import load_video_model
from ..models.threads import cpu_threads, fitting_threads, is_small
from ..models.vae import to_pixels
from ..models.video_model import VideoModel, pick_cache_dtype, pick_device, pick_dtype
from ..planning.free_memory import require_memory
from ..rollout import FinishedBlock, PipelineOptions, Rollout
from ..rollout.run_folder import RunFolder
from ..rollout.session_io import load_session, save_session
from ..schedule.plan import Plan, windows_per_step
from .conditioning import Given, read_given
from .decode import Decoding
from .metadata import describe
from .prompt_schedule import Script, Show, prompt_delay

Window = int | Sequence[int | None] | None | Literal["model"]
Progress = Callable[[int, int | None, int, int | None], None]
"""Called with (pixel frames done, in all, forwards done, in all); "in all" is None for an endless video."""


class Generation:
    """One checked request: every mistake is found here, before work starts. Iterate once for the frames.

    Args: as for :func:`generate`; ``endless`` makes ``num_frames`` None mean a video without an end; ``executor``,
    ``pipeline``, ``parallel``, ``pairs``, ``on_nan`` and ``on_new_text`` as for :class:`Rollout`. With a pipeline
    finished blocks, and every ``checkpoint_every`` of them the states of all ranks, are kept in the folder ``keep``,
    and ``resume`` goes on with those of an interrupted run.

    ``height``, ``width`` of the frames, in pixels; None: as the model says. ``cache_dtype`` of keys and values, a name
    (float8_e4m3fn among them) or a dtype; None: that of the model.

    ``image`` (a file) or ``extend`` (a clip, a file) is what the video begins with (:mod:`.conditioning`): its
    frames come first, as they are, and count in ``num_frames``; None means as many new blocks as otherwise.

    ``prompts`` change on the way (:class:`.prompt_schedule.Script`); ``prompt`` is then that of the time before the
    script's first line, or None. ``session`` is a file of :meth:`save_session` to go on from: frames come from there
    on; with another prompt it is a fork, which shows it from the first block that had not begun. ``open_end``: the
    video is made as the beginning of an endless one, ``num_frames`` only says how far, counted from its start; so its
    session goes on beyond. None is then as many new blocks as otherwise.

    ``threads`` of torch on a CPU while frames are made; None: one for a small model such as the toy, else torch's own
    setting. What the caller has set is put back before each block is handed over.

    Raises:
        ValueError: one line that names what is wrong and what would be right.
    """

    @own_settings()
    def __init__(
        self,
        prompt: str | None,
        *,
        model: str | os.PathLike[str] | VideoModel = "toy",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        order: str | None = None,
        window_frames: Window = "model",
        sink_frames: int | None = None,
        fps: float | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        cache_dtype: str | torch.dtype | None = None,
        image: str | os.PathLike[str] | None = None,
        extend: str | os.PathLike[str] | None = None,
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
        open_end: bool = False,
        threads: int | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        num_frames, steps, sink_frames, threads = (
            None if value is None else whole(name, value, least, most=most)
            for name, value, least, most in (
                ("num_frames", num_frames, 1, None), ("steps", steps, 1, MOST_STEPS),
                ("sink_frames", sink_frames, 0, None), ("threads", threads, 1, MOST_THREADS))
        )  # fmt: skip
        seed = whole("seed", seed)
        if prompts is not None and not isinstance(prompts, Script):
            raise ValueError(f"prompts must be a Script, such as Script.read('script.txt'), got {prompts!r}")
        if on_progress is not None and not callable(on_progress):
            raise ValueError(f"on_progress must be a function or None, got {on_progress!r}")
        if session is not None:
            path_like("session", session)
        if order is not None:
            one_of("order", order, ORDERS)
        fps = None if fps is None else check_fps(fps)
        blockwise, endless = endless or open_end, endless and num_frames is None
        if (endless or open_end) and order == "step_first":
            others = ", ".join(name for name in ORDERS if name != "step_first")
            what = "a video whose session goes on: use" if open_end else "an endless video: give num_frames, or use"
            raise ValueError(f"order step_first cannot make {what} {others}")
        kept_dtype = pick_cache_dtype(cache_dtype)
        if session is not None and keep is not None:
            raise ValueError(f"session={os.fspath(session)!r} is of one process, a pipeline keeps its own: give one")
        require_memory(
            model, pick_device(device), pick_dtype(dtype), height=height, width=width, num_frames=num_frames,
            steps=steps, order=order, window_frames=window_frames, sink_frames=sink_frames, cache_dtype=kept_dtype,
        )  # fmt: skip
        self.model = _load(model, device, dtype).sized(height, width)
        if order is None:
            order = self.model.order or "step_first"
            if order == "step_first" and blockwise:
                order = "stream"  # the same result, block by block
            elif self.model.order is None and prompts is None and is_small(self.model.transformer):
                order = "wavefront"  # likewise, in fewer and larger calls
        self.threads = fitting_threads(self.model.transformer, asked=threads)
        self.schedule = self.model.schedule if steps is None else FlowSchedule.uniform(steps, self.model.schedule.shift)
        networks = self.model.networks(len(self.schedule))
        self.fps = float(self.model.fps if fps is None else fps)
        window = self._window(window_frames, endless or open_end)
        sink = self.model.sink_frames if sink_frames is None else sink_frames
        self.given = read_given(image, extend, self.model.pixel_size, self.model.temporal_compression, self.fps)
        prefix_frames = self._prefix_frames()
        latent_frames = self._latent_frames(num_frames, endless, prefix_frames)
        self.num_frames = None if latent_frames is None else self.model.pixel_frames(latent_frames)
        made_of = None if open_end else latent_frames  # what the rollout knows of its length
        windows = windows_per_step(window, len(self.schedule))
        blocks = Plan(len(self.schedule), order, self.model.frames_per_block, prefix_frames, windows, sink,
                      self.model.cache_source)  # fmt: skip
        self.prefix = None if self.given is None else self._encoded(self.given)
        self.show: Show | None = None
        text = self._text(prompt, prompts, blocks, made_of)
        _, rows, columns = self.model.latent_size
        me = weakref.proxy(self)  # no cycle: the rings are given back at once where a generation is dropped
        self.rollout = Rollout(
            networks,
            text,
            self.schedule,
            num_frames=made_of,
            height=rows,
            width=columns,
            order=order,
            frames_per_block=self.model.frames_per_block,
            window_frames=window,
            sink_frames=sink,
            cache_source=self.model.cache_source,
            prefix=self.prefix,
            seed=seed,
            cache_dtype=kept_dtype,
            executor=executor,
            pipeline=pipeline,
            parallel=parallel,
            pairs=pairs,
            on_new_text=on_new_text,
            on_nan=on_nan,
            on_visit=None if on_progress is None else lambda done, total: me._visited(done, total),
            on_boundary=lambda block: me._boundary(block),
        )
        self.on_progress, self.frames_done = on_progress, 0
        self.options = {
            "image": image, "extend": extend,
            "cache-dtype": None if kept_dtype is None else str(kept_dtype).removeprefix("torch."),
            "on-new-text": None if prompts is None else on_new_text, "on-nan": None if on_nan == "stop" else on_nan,
            "from-session": session,
        }  # fmt: skip
        self.on_new_text = on_new_text
        self.seed = seed
        self.decoding: Decoding | None = None
        self.session, self._ends = session, False
        if session is not None:
            self.decoding = Decoding(self.model.decoder())
            self.frames_done = load_session(session, self.rollout, self.decoding.kept, self._facts()).about["frames"]
        self._last = self._last_block(num_frames, session) if open_end else None
        self.metadata = describe(self, prompt, seed=seed, steps=steps, order=order, window=window, sink=sink)
        self.kept = None if keep is None else self._keep(keep, resume, checkpoint_every)

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
        with closing(self._made()) as made:
            while True:
                with own_settings(), cpu_threads(self.threads):
                    frames = next(made, None)
                if frames is None:
                    return
                yield frames

    def _made(self) -> Generator[Frames, None, None]:
        decoding = self.decoding = self.decoding or Decoding(self.model.decoder())
        if self.given is not None and self.session is None and self.shows:
            assert self.prefix is not None
            decoding.skip(self.prefix)
            self.frames_done = len(self.given.frames)
            yield self.given.frames
        for block in self._blocks():
            if self.shows:
                yield from map(self._checked, decoding.put(block.block, block.latents))
            if self._ends or block.block == self._last:
                break
        yield from map(self._checked, decoding.rest())

    def _checked(self, made: tuple[int, Frames]) -> Frames:
        block, frames = made
        first, self.frames_done = self.frames_done, self.frames_done + len(frames)
        if not frames.any():
            step, last = len(self.schedule) - 1, self.frames_done - 1
            raise FloatingPointError(f"frames {first} to {last} came out all black: step {step}, block {block}")
        self._report(self.rollout.forwards_done)
        return frames

    def end(self) -> None:
        """Let the iteration end behind the block that is being made, such as from a signal handler."""
        self._ends = True

    @own_settings()
    def save_session(self, path: str | os.PathLike[str]) -> Path:
        """Write a session, between two blocks: see :func:`hiar_model.rollout.session_io.save_session`."""
        if self.decoding is None:
            raise ValueError("a session begins with the first block: there is nothing to save yet")
        return save_session(path, self.rollout, self.decoding.kept, {**self._facts(), "frames": self.frames_done})

    def _facts(self) -> dict[str, Any]:
        """What a session must have in common with the run that goes on with it."""
        facts: dict[str, Any] = {"weights_sha256": self.model.weights_sha256, "seed": self.seed}
        if self.given is not None:
            facts["given_sha256"] = hashlib.sha256(self.given.frames.tobytes()).hexdigest()
        return facts

    def told(self) -> list[str]:
        """What is to be said about prompts that change: from when on each shows, and what a live change would wait."""
        if self.show is None:
            return []
        plan, pipeline = self.rollout.plan, self.rollout.pipeline
        if plan.order == "step_first":
            return self.show.told()
        ranks = 1 if pipeline is None else len([n for n in pipeline.stage.split if n])
        return [*self.show.told(), str(prompt_delay(plan, ranks, self.on_new_text))]

    def _prefix_frames(self) -> int:
        """Latent frames of what is given."""
        if self.given is None:
            return 0
        return 1 + (len(self.given.frames) - 1) // self.model.temporal_compression

    def _latent_frames(self, asked: int | None, endless: bool, given: int) -> int | None:
        """Latent frames of the video; None: endless."""
        if asked is not None:
            return self.model.latent_frames(asked, given)
        return None if endless else given + self.model.latent_frames(self.model.num_frames)

    def _last_block(self, asked: int | None, session: str | os.PathLike[str] | None) -> int:
        """The block that ends an iteration of a video with an open end."""
        plan, block, done = self.rollout.plan, self.model.frames_per_block, self.rollout.blocks_done
        assert self.num_frames is not None
        if session is not None and asked is None:
            more = self.model.latent_frames(self.model.num_frames)
            self.num_frames = self.model.pixel_frames(plan.block_frames(done - 1)[1] + more)
        latent = self.model.latent_frames(self.num_frames, plan.prefix_frames)
        last = plan.prefix_blocks + (latent - plan.prefix_frames) // block - 1
        if last < done and session is not None:
            stands = self.model.pixel_frames(plan.block_frames(done - 1)[1])
            raise ValueError(f"{os.fspath(session)} stands at frame {stands}: num_frames must be more, got {asked}")
        return last

    def _encoded(self, given: Given) -> Tensor:
        """[1, f, C, h, w]"""
        return self.model.encoder().encode(to_pixels(given.frames)).to(self.model.device, self.model.dtype)

    def _text(
        self, prompt: str | None, prompts: Script | None, blocks: Plan, latent_frames: int | None
    ) -> Tensor | Show:
        """Of the one prompt, or of each block."""
        if prompts is None:
            return self.model.encode_text(prompt)  # type: ignore[arg-type]  # refuses None by name

        def start(n: int) -> float:
            return self.model.pixel_frames(blocks.block_frames(n)[0]) / self.fps

        num_blocks = None if latent_frames is None else blocks.block_of(latent_frames - 1) + 1
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
        names = ("prompt", "prompts", "weights_sha256", "height", "width", "given", "num_frames", "seed", "noise",
                 "timesteps", "frames_per_block", "window_frames", "sink_frames", "dtype")  # fmt: skip
        about = {name: self.metadata[name] for name in names} | {"steps_per_rank": list(pipeline.stage.split)}
        return RunFolder(folder, about, resume=resume, every=every, group=pipeline.group)

    def _boundary(self, block: int) -> None:
        if self.kept is not None:
            self.kept.boundary(self.rollout, block)

    def _window(self, asked: Window, endless: bool) -> int | tuple[int | None, ...] | None:
        """The window in use: one number, one per step, or None for all earlier frames."""
        window = self.model.window_frames if isinstance(asked, str) and asked == "model" else asked
        sequence = isinstance(window, Iterable) and not isinstance(window, str | bytes)
        if window is not None and as_whole(window) is None and not sequence:
            raise ValueError(f'window_frames must be a number, one per step, None (all) or "model", got {window!r}')
        windows: tuple[int | None, ...]
        if window is None or as_whole(window) is not None:
            window = as_whole(window)
            windows = (window,)
        else:
            windows = tuple(None if each is None else whole("window_frames", each) for each in window)  # type: ignore[union-attr]
            window = windows
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


def generate(
    prompt: str | None,
    *,
    model: str | os.PathLike[str] | VideoModel = "toy",
    num_frames: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    order: str | None = None,
    window_frames: Window = "model",
    sink_frames: int | None = None,
    fps: float | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    on_progress: Progress | None = None,
    **more: Any,
) -> Video:
    """A video of a prompt. The same arguments give the same video.

    Args:
        prompt: what to show; the toy model knows "a [small|large] COLOUR SHAPE moving DIRECTION [slowly|fast]". None
            only with ``prompts``.
        model: a shipped model's name, a folder (of Wan, too), or one that :func:`hiar_model.load_video_model` loaded.
        num_frames: pixel frames, whole blocks of them; None: what the model says.
        seed: of all noise.
        steps: denoising steps, spread evenly; None: the model's own.
        order: step_first, stream, wavefront (one result, other memory and speed) or block_first (clean context); None:
            what the model was trained for, else step_first, or wavefront for a small model on a CPU.
        window_frames: latent frames that a block sees, its own among them: a number, one per step, or None: all;
            "model": as trained.
        sink_frames: first frames that always stay visible, inside the window's number; None: the model's.
        fps: of the written video; None: the model's.
        device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "bfloat16", "float16" or "float64"; None: float32, bfloat16 of Wan.
        on_progress: called with (frames done, in all, forwards done, in all) after every group of visits.
        more: of :class:`Generation`: height, width, image, extend, prompts, threads, cache_dtype, session, ...

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
        **more,
    )
    with span("generate"):
        return Video(np.concatenate(list(run)), run.fps, run.metadata)


def stream(
    prompt: str | None,
    *,
    model: str | os.PathLike[str] | VideoModel = "toy",
    num_frames: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    order: str | None = None,
    window_frames: Window = "model",
    sink_frames: int | None = None,
    fps: float | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    on_progress: Progress | None = None,
    **more: Any,
) -> Iterator[Frames]:
    """The blocks of a video, uint8 [f, H, W, 3] each, as they come; ``num_frames`` None: without an end.

    The request is checked at the call, work starts with the first ``next``. Arguments and errors as for
    :func:`generate`; in place of step_first the order is "stream" unless said otherwise, since step_first shows nothing
    until nearly all is done and has no endless form.
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
            **more,
        )
    )


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
