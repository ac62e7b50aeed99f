"""Prompt to video: :class:`VideoPipeline`; `generate` makes a whole video, `stream` yields its blocks as they come."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from hiar_kernels.nvtx import span

from ..common.checks import one_of, whole
from ..common.settings import own_settings
from ..config import ExecutionConfig, RolloutConfig
from ..config.rollout import ORDERS
from ..io.video import Frames, Video, check_fps
from ..models.registry import load_video_model, model_folder
from ..models.threads import cpu_threads, fitting_threads, is_small
from ..models.vae import to_pixels
from ..models.video_model import VideoModel, pick_device, pick_dtype
from ..planning.free_memory import require_memory
from ..rollout import FinishedBlock, Rollout
from ..rollout.run_folder import RunFolder
from ..rollout.session_io import load_session, save_session
from ..schedule.plan import Plan
from .conditioning import Given, read_given
from .decode import Decoding
from .metadata import describe
from .prompt_schedule import Script, Show, prompt_delay

Window = int | Sequence[int | None] | None | Literal["model"]
Progress = Callable[[int, int | None, int, int | None], None]
"""Called with (pixel frames done, in all, forwards done, in all); "in all" is None for an endless video."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class VideoOptions:
    """What can be said about one video; sizes and counts are in pixels and pixel frames.

    Args:
        prompt: what to show; the toy model knows "a [small|large] COLOUR SHAPE moving DIRECTION [slowly|fast]". None
            only with ``prompts``.
        height, width: of the frames; None: as the model says.
        num_frames: pixel frames, whole blocks of them; None: what the model says.
        seed: of all noise.
        steps: denoising steps, spread evenly; None: the model's own.
        order: "step_first", "stream", "wavefront" (one result, other memory and speed) or "block_first" (clean
            context); None: what the model was trained for, or its fastest equal.
        window_frames: latent frames that a block sees, its own among them: a number, one per step, or None: all;
            "model": as trained.
        sink_frames: first latent frames that always stay visible, inside the window's number; None: the model's.
        fps: of the written video; None: the model's.
        image, extend: a picture, or a clip, that the video begins with (files): its frames come first, as they are, and
            count in ``num_frames``; None means as many new blocks as otherwise.
        prompts: they change on the way (:class:`hiar_model.Script`); ``prompt`` is then that of the time before the
            script's first line, or None.
        on_prompt_change: "keep" or "recache", of :class:`hiar_model.RolloutConfig`.
        fuse_cache_denoise: of :class:`hiar_model.RolloutConfig`.
        session: a file of :meth:`VideoRun.save_session` to go on from: frames come from there on; with another prompt
            it is a fork, which shows it from the first block that had not begun.
        open_end: the video is made as the beginning of an endless one, ``num_frames`` only says how far, counted from
            its start; so its session goes on beyond.
        run_folder: of a pipeline: a folder in which finished blocks, and every ``checkpoint_every`` of them the states
            of all ranks, are kept; ``resume`` goes on with those of an interrupted run.
        threads: of torch on a CPU while frames are made; None: one for a small model such as the toy, else torch's own
            setting. What the caller has set is put back before each block is handed over.
        on_progress: called with (frames done, in all, forwards done, in all) after every group of tasks.
    """

    prompt: str | None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    seed: int = 0
    steps: int | None = None
    order: str | None = None
    window_frames: Window = "model"
    sink_frames: int | None = None
    fps: float | None = None
    image: str | os.PathLike[str] | None = None
    extend: str | os.PathLike[str] | None = None
    prompts: Script | None = None
    on_prompt_change: str = "keep"
    fuse_cache_denoise: bool = False
    session: str | os.PathLike[str] | None = None
    open_end: bool = False
    run_folder: str | os.PathLike[str] | None = None
    resume: bool = False
    checkpoint_every: int = 10
    threads: int | None = None
    on_progress: Progress | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_frames", 1), ("steps", 1), ("sink_frames", 0), ("threads", 1)):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else whole(name, value, least))
        object.__setattr__(self, "seed", whole("seed", self.seed))
        if self.order is not None:
            one_of("order", self.order, ORDERS)
        object.__setattr__(self, "fps", None if self.fps is None else check_fps(self.fps))
        if self.session is not None and self.run_folder is not None:
            raise ValueError(
                f"session={os.fspath(self.session)!r} is of one process, a pipeline keeps its own: give one"
            )


def _video_options(returns: Any) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Gives a function the signature of its own first parameters, then every field of :class:`VideoOptions`."""

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        prompt, *options = (
            inspect.Parameter(
                f.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD if f.name == "prompt" else inspect.Parameter.KEYWORD_ONLY,
                default=f.default if f.name != "prompt" else inspect.Parameter.empty,
                annotation=f.type,
            )
            for f in fields(VideoOptions)
        )
        first = [p for p in own if p.name == "self"]
        rest = [p for p in own if p.name not in ("self", "prompt")]
        function.__signature__ = inspect.Signature([*first, prompt, *rest, *options], return_annotation=returns)  # type: ignore[attr-defined]
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{_OPTIONS}"
        return function

    return decorate


_OPTIONS = inspect.cleandoc(VideoOptions.__doc__ or "").partition("\n\n")[2]


class VideoPipeline:
    """Prompts to videos, with one model that is loaded once.

    Args:
        model: a shipped model's name, a folder (of Wan, too), or one that :func:`hiar_model.load_video_model` loaded.
        execution: where and how it runs; None: eagerly, in this process.
        device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "bfloat16", "float16" or "float64"; None: float32, but bfloat16 of Wan.

    Raises:
        ValueError: one line that names what is wrong and what would be right.

    Example:
        >>> from hiar_model import VideoPipeline
        >>> pipeline = VideoPipeline("toy", device="cpu")
        >>> pipeline("a red circle moving right", num_frames=12, steps=2).frames.shape
        (12, 32, 32, 3)
        >>> [len(block) for block in pipeline.stream("a blue square moving up", num_frames=6, steps=2)]
        [3, 3]
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | VideoModel = "toy",
        execution: ExecutionConfig | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        self.execution, self._named = execution or ExecutionConfig(), model
        self.device, self.dtype = pick_device(device), pick_dtype(dtype)
        if isinstance(model, VideoModel):
            if device != "auto" and self.device != model.device:
                raise ValueError(f"the model given is on {model.device}, not on {device}: load it there")
            if self.dtype not in (None, model.dtype):
                raise ValueError(f"the model given is in {model.dtype}, not in {dtype}: load it so")
        else:
            model_folder(model)

    @functools.cached_property
    def model(self) -> VideoModel:
        """Loaded when it is first needed: a video that does not fit into memory is refused before that."""
        if isinstance(self._named, VideoModel):
            return self._named
        return load_video_model(self._named, self.device, self.dtype)

    @_video_options("Video")
    def __call__(self, prompt: str | None, **options: Any) -> Video:
        """A whole video. The same arguments give the same video."""
        run = self.prepare(VideoOptions(prompt, **options))
        with span("generate"):
            return Video(np.concatenate(list(run)), run.fps, run.metadata)

    @_video_options("Iterator[Frames]")
    def stream(self, prompt: str | None, **options: Any) -> Iterator[Frames]:
        """The blocks of a video, uint8 [f, H, W, 3] each, as they come; ``num_frames`` None: without an end.

        The request is checked at the call, work starts with the first ``next``. In place of step_first the order is
        "stream" unless said otherwise: step_first shows nothing until nearly all is done and has no endless form.
        """
        return iter(self.prepare(VideoOptions(prompt, **options), blockwise=True))

    def prepare(self, options: VideoOptions, *, blockwise: bool = False) -> VideoRun:
        """A checked request: every mistake is found here, before work starts.

        Args:
            blockwise: blocks are shown as they come; ``num_frames`` None then means a video without an end.
        """
        if "model" not in vars(self):
            require_memory(
                self._named, self.device, self.dtype, height=options.height, width=options.width,
                num_frames=options.num_frames, steps=options.steps, order=options.order,
                window_frames=options.window_frames, sink_frames=options.sink_frames,
                kv_dtype=self.execution.kv_dtype,
            )  # fmt: skip
        return VideoRun(self.model, self.execution, options, blockwise)


def rollout_config(model: VideoModel, options: VideoOptions, blockwise: bool = False) -> RolloutConfig:
    """What is computed: as the model was trained, but for what the options say."""
    config = model.rollout
    if options.steps is not None:
        config = config.with_steps(options.steps)
    if options.window_frames != "model":
        if isinstance(options.window_frames, str):
            raise ValueError(
                'window_frames must be a number, one per step, None (all) or "model", '
                f"got {options.window_frames!r}"
            )
        config = replace(config, window_frames=options.window_frames)  # type: ignore[arg-type]
    if options.sink_frames is not None:
        config = replace(config, sink_frames=options.sink_frames)
    order = options.order or config.order
    if options.order is None and order == "step_first":
        if blockwise:
            order = "stream"  # the same result, block by block
        elif options.prompts is None and is_small(model.transformer):
            order = "wavefront"  # likewise, in fewer and larger calls
    return replace(
        config,
        order=order,
        on_prompt_change=options.on_prompt_change,
        fuse_cache_denoise=options.fuse_cache_denoise,
    )


class VideoRun:
    """One video being made, of :meth:`VideoPipeline.prepare`. Iterate once for the frames, block by block."""

    @own_settings()
    def __init__(
        self, model: VideoModel, execution: ExecutionConfig, options: VideoOptions, blockwise: bool = False
    ) -> None:
        self.options, self.execution = options, execution
        endless = blockwise and options.num_frames is None and not options.open_end
        blockwise = blockwise or options.open_end
        if (endless or options.open_end) and options.order == "step_first":
            others = ", ".join(name for name in ORDERS if name != "step_first")
            what = "a video whose session goes on:" if options.open_end else "an endless video: give num_frames, or"
            raise ValueError(f"order step_first cannot make {what} use {others}")
        self.model = model.sized(options.height, options.width)
        self.config = rollout_config(self.model, options, blockwise)
        self.fps = float(self.model.fps if options.fps is None else options.fps)
        self.threads = fitting_threads(self.model.transformer, requested=options.threads)
        if (endless or options.open_end) and None in self.config.windows:
            raise ValueError("an endless video needs a window: give window_frames")
        networks = self.model.networks(len(self.config.steps))
        self.given = read_given(
            options.image, options.extend, self.model.pixel_size, self.model.temporal_compression, self.fps
        )
        prefix_frames = self._prefix_frames()
        latent_frames = self._latent_frames(options.num_frames, endless, prefix_frames)
        self.num_frames = None if latent_frames is None else self.model.pixel_frames(latent_frames)
        length = None if options.open_end else latent_frames  # what the rollout knows of it
        self.prefix = None if self.given is None else self._encoded(self.given)
        self.show: Show | None = None
        text = self._text(options.prompt, options.prompts, Plan.of(self.config, prefix_frames), length)
        self.rollout = Rollout(
            networks,
            text,
            self.config,
            execution,
            num_latent_frames=length,
            latent_size=self.model.latent_size[1:],
            seed=options.seed,
            prefix=self.prefix,
        )
        me = weakref.proxy(self)  # no cycle: the caches are given back at once where a run is dropped
        if options.on_progress is not None:
            self.rollout.on_task = lambda done, total: me._visited(done, total)
        self.rollout.on_boundary = lambda block: me._boundary(block)
        self.on_progress, self.frames_done = options.on_progress, 0
        self.decoding: Decoding | None = None
        self.session, self._ends = options.session, False
        if options.session is not None:
            self.decoding = Decoding(self.model.decoder())
            session = load_session(options.session, self.rollout, self.decoding.kept, self._facts())
            self.frames_done = session.about["frames"]
        self._last = self._last_block(options.num_frames, options.session) if options.open_end else None
        self.metadata = describe(self)
        self.run_folder = None if options.run_folder is None else self._open_folder(options.run_folder)

    @property
    def makes_frames(self) -> bool:
        """Whether frames come in this process: the last one of a pipeline, the first of those that share heads, or the
        only one.
        """
        return self.rollout.heads[0] == 0 and self.rollout.makes_blocks

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
        if self.given is not None and self.session is None and self.makes_frames:
            assert self.prefix is not None
            decoding.skip(self.prefix)
            self.frames_done = len(self.given.frames)
            yield self.given.frames
        for block in self._blocks():
            if self.makes_frames:
                yield from map(self._checked, decoding.put(block.block, block.latents))
            if self._ends or block.block == self._last:
                break
        yield from map(self._checked, decoding.rest())

    def _checked(self, made: tuple[int, Frames]) -> Frames:
        block, frames = made
        first, self.frames_done = self.frames_done, self.frames_done + len(frames)
        if not frames.any():
            step, last = len(self.config.steps) - 1, self.frames_done - 1
            raise FloatingPointError(f"frames {first} to {last} came out all black: step {step}, block {block}")
        self._report(self.rollout.forwards_done)
        return frames

    def end(self) -> None:
        """Let the iteration end behind the block that is being made, such as from a signal handler."""
        self._ends = True

    @own_settings()
    def save_session(self, path: str | os.PathLike[str]) -> Path:
        """Write a session, between two blocks: see :func:`hiar_model.save_session`."""
        if self.decoding is None:
            raise ValueError("a session begins with the first block: there is nothing to save yet")
        return save_session(path, self.rollout, self.decoding.kept, {**self._facts(), "frames": self.frames_done})

    def _facts(self) -> dict[str, Any]:
        """What a session must have in common with the run that goes on with it."""
        facts: dict[str, Any] = {"weights_sha256": self.model.weights_sha256, "seed": self.options.seed}
        if self.given is not None:
            facts["given_sha256"] = hashlib.sha256(self.given.frames.tobytes()).hexdigest()
        return facts

    def notes(self) -> list[str]:
        """What is to be said about prompts that change: from when on each shows, and what a live change would wait."""
        if self.show is None:
            return []
        plan, pipeline = self.rollout.plan, self.rollout.pipeline
        if plan.order == "step_first":
            return self.show.told()
        ranks = 1 if pipeline is None else len([n for n in pipeline.stage.split if n])
        return [*self.show.told(), str(prompt_delay(plan, ranks, self.options.on_prompt_change))]

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
        plan, block, done = self.rollout.plan, self.config.frames_per_block, self.rollout.blocks_done
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
        if self.run_folder is None:
            yield from self.rollout
            return
        known = self.run_folder.resume(self.rollout)
        for block in range(self.rollout.plan.prefix_blocks, known if self.makes_frames else 0):
            yield self.run_folder.load_block(block)
        for finished in self.rollout:
            self.run_folder.save_block(finished)
            yield finished

    def _open_folder(self, folder: str | os.PathLike[str]) -> RunFolder:
        pipeline = self.rollout.pipeline
        if pipeline is None:
            raise ValueError("blocks are kept, and runs resumed, in a pipeline only: give --parallel pipeline")
        names = ("prompt", "prompts", "weights_sha256", "height", "width", "given", "num_frames", "seed", "noise",
                 "rollout", "dtype")  # fmt: skip
        about = {name: self.metadata[name] for name in names} | {"steps_per_rank": list(pipeline.stage.split)}
        return RunFolder(
            folder, about, resume=self.options.resume, every=self.options.checkpoint_every, group=pipeline.group
        )

    def _boundary(self, block: int) -> None:
        if self.run_folder is not None:
            self.run_folder.boundary(self.rollout, block)

    def _visited(self, done: int, total: int | None) -> None:
        self._report(done)

    def _report(self, forwards_done: int) -> None:
        if self.on_progress is not None:
            self.on_progress(self.frames_done, self.num_frames, forwards_done, self.rollout.forwards_total)


@_video_options("Video")
def generate(
    prompt: str | None,
    *,
    model: str | os.PathLike[str] | VideoModel = "toy",
    execution: ExecutionConfig | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Video:
    """A video of a prompt: ``VideoPipeline(model, execution, device=device, dtype=dtype)(prompt, ...)``.

    The same arguments give the same video.

    Raises:
        ValueError: one line for whatever is wrong with the request, before work starts.
        FloatingPointError: not finite or all black, with step and block.

    Example:
        >>> from hiar_model import generate
        >>> generate("a red circle moving right", num_frames=12, steps=2, device="cpu").frames.shape
        (12, 32, 32, 3)
    """
    return VideoPipeline(model, execution, device=device, dtype=dtype)(prompt, **options)


@_video_options("Iterator[Frames]")
def stream(
    prompt: str | None,
    *,
    model: str | os.PathLike[str] | VideoModel = "toy",
    execution: ExecutionConfig | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Iterator[Frames]:
    """The blocks of a video, uint8 [f, H, W, 3] each, as they come: :meth:`VideoPipeline.stream`.

    ``num_frames`` None: without an end. The request is checked at the call, work starts with the first ``next``.
    """
    return VideoPipeline(model, execution, device=device, dtype=dtype).stream(prompt, **options)
