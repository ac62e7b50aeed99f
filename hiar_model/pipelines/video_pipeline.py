"""Prompt to video: :class:`VideoPipeline`. `generate` returns a whole video, `stream` yields it block by block."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hiar_kernels.nvtx import span

from ..common.checks import MOST_FRAMES, MOST_STEPS, MOST_THREADS, one_of, path_like, true_or_false, whole
from ..common.image_file import ImageLike
from ..common.settings import own_settings
from ..config import ExecutionConfig, RolloutConfig
from ..config.rollout import ORDERS
from ..io.video import Frames, Video, check_fps
from ..models.registry import load_video_model, model_folder
from ..models.threads import cpu_threads, fitting_threads, is_small
from ..models.video_model import VideoModel, pick_device, pick_dtype
from ..planning.free_memory import require_memory
from ..rollout import FinishedBlock, Rollout
from ..rollout.run_folder import RunFolder
from ..rollout.session_io import PICTURES, load_session, require_same_run, save_session
from ..schedule.plan import Plan
from .decode import Decoding
from .lora import LoraLoading, ScaleFollower
from .metadata import describe
from .prompt_schedule import EncodedPromptSchedule, LivePrompts, PromptSchedule, prompt_delay
from .signature import Function, with_options
from .starts import Ending, Starts

Window = int | Sequence[int | None] | None | Literal["model"]
Progress = Callable[[int, int | None, int, int | None], None]
"""Called with (pixel frames done, total, forwards done, total); the totals are None for an endless video."""


@dataclass(frozen=True)
class VideoOptions:
    """The options of one video; sizes and counts are in pixels and pixel frames.

    Args:
        prompt: what to show; the toy model knows "a [small|large] COLOUR SHAPE moving DIRECTION [slowly|fast]". None
            only with ``prompts``.
        height, width: of the frames; None: the model's.
        num_frames: pixel frames, in whole blocks; None: the model's.
        seed: of all noise.
        steps: denoising steps, evenly spaced; None: the model's.
        order: "step_first", "stream", "wavefront" (same result, different memory and speed) or "block_first" (clean
            context); None: what the model was trained for, or the fastest order with the same result.
        window_frames: latent frames that a block sees, its own included: a number, one per step, or None: all;
            "model": as trained.
        sink_frames: first latent frames that always stay visible, within ``window_frames``; None: the model's.
        fps: of the written video; None: the model's.
        image, extend: path of a picture, or of a clip, that the video starts with. Its frames come first, unchanged,
            and count in ``num_frames``; ``num_frames=None`` then adds as many new blocks as usual. Several images are a
            storyboard: [path, "path@frame" or (path, frame), ...]; behind frame 0, a block must begin at the frame.
        last_frame: path of a picture that the video ends with. The blocks before it are infilled: made at once, as many
            as fit the length of the training clips, which is also the default length.
        prompts: a :class:`hiar_model.PromptSchedule`, with ``prompt`` before its first line, or None; or `LivePrompts`.
        on_prompt_change: "keep" or "recache", of :class:`hiar_model.RolloutConfig`.
        fuse_cache_denoise: of :class:`hiar_model.RolloutConfig`.
        session: a file of :meth:`VideoRun.save_session` to resume: frames start there. A different prompt makes a fork,
            which takes effect at the first block that had not started.
        open_end: make the video as the beginning of an endless one, so that its session can go beyond ``num_frames``,
            which counts from its start.
        run_folder: of a pipeline: the folder for finished blocks and, every ``checkpoint_every`` blocks, the states of
            all ranks; ``resume`` continues an interrupted run.
        threads: CPU threads of torch while frames are made; None: one for a small model such as the toy, else torch's
            setting. The caller's setting is restored before each block is handed over.
        on_progress: called with (frames done, total, forwards done, total) after every group of tasks.
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
    image: ImageLike | Sequence[ImageLike] | None = None
    extend: str | os.PathLike[str] | None = None
    last_frame: str | os.PathLike[str] | None = None
    prompts: PromptSchedule | LivePrompts | None = None
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
        for name, least, most in (
            ("num_frames", 1, MOST_FRAMES), ("steps", 1, MOST_STEPS), ("sink_frames", 0, MOST_FRAMES),
            ("threads", 1, MOST_THREADS),
        ):  # fmt: skip
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else whole(name, value, least, most=most))
        if not isinstance(self.prompts, PromptSchedule | LivePrompts | None):
            raise ValueError(f"prompts must be a PromptSchedule (.read('script.txt')), got {self.prompts!r}")
        if self.on_progress is not None and not callable(self.on_progress):
            raise ValueError(f"on_progress must be a function or None, got {self.on_progress!r}")
        for name in ("session", "run_folder"):
            if getattr(self, name) is not None:
                path_like(name, getattr(self, name))
        for name in ("open_end", "resume"):
            object.__setattr__(self, name, true_or_false(name, getattr(self, name)))
        if self.resume and self.run_folder is None:
            raise ValueError("resume=True needs the run_folder to go on from, got None")
        object.__setattr__(self, "checkpoint_every", whole("checkpoint_every", self.checkpoint_every, 0))
        object.__setattr__(self, "seed", whole("seed", self.seed))
        if self.order is not None:
            one_of("order", self.order, ORDERS)
        object.__setattr__(self, "fps", None if self.fps is None else check_fps(self.fps))
        if self.last_frame is not None:
            for name in ("session", "prompts", "run_folder", "open_end"):
                if getattr(self, name):
                    raise ValueError(f"last_frame and {name} exclude each other: give one")
        if self.session is not None and self.run_folder is not None:
            raise ValueError(
                f"session={os.fspath(self.session)!r} and run_folder exclude each other: a session is of one process, "
                "a run folder of a pipeline"
            )

    @property
    def of_rollout(self) -> dict[str, Any]:
        """Those that are fields of :class:`hiar_model.RolloutConfig`, for its :meth:`~RolloutConfig.with_options`."""
        return {f.name: getattr(self, f.name) for f in fields(RolloutConfig) if hasattr(self, f.name)}


def video_options(returns: Any, without: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Append the fields of :class:`VideoOptions` to a function's signature and, unless some are left out, docstring."""
    return with_options(VideoOptions, returns, without)


class VideoPipeline(LoraLoading):
    """Makes videos of prompts with one model, which is loaded once.

    Args:
        model: name of a shipped model, a folder (also of Wan), or a model of :func:`hiar_model.load_video_model`.
        execution: where and how it runs; None: eagerly, in this process.
        device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "bfloat16", "float16" or "float64"; None: bfloat16 for Wan, else float32.

    Raises:
        ValueError: one line with the illegal argument, its value and the legal values.

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
                raise ValueError(f"device must be that of the loaded model, {model.device}, got {device}")
            if self.dtype not in (None, model.dtype):
                raise ValueError(f"dtype must be that of the loaded model, {model.dtype}, got {dtype}")
        else:
            model_folder(model)

    @functools.cached_property
    def model(self) -> VideoModel:
        """The model; loaded on first use, after the memory check of the first video."""
        if isinstance(self._named, VideoModel):
            return self._named
        return load_video_model(self._named, self.device, self.dtype, linear_dtype=self.execution.linear_dtype)

    @video_options("Video")
    def __call__(self, prompt: str | None, **options: Any) -> Video:
        """A whole video. The same arguments give the same video."""
        run = self.prepare(VideoOptions(prompt, **options))
        with span("generate"):
            return Video(np.concatenate(list(run)), run.fps, run.metadata)

    @video_options("Iterator[Frames]")
    def stream(self, prompt: str | None, **options: Any) -> Iterator[Frames]:
        """Yield a video block by block, uint8 [f, H, W, 3] each; ``num_frames`` None: endless.

        The options are checked at the call, work starts with the first ``next``. The default order is "stream" in place
        of step_first, which finishes no block until nearly all is done and cannot be endless.
        """
        return iter(self.prepare(VideoOptions(prompt, **options), blockwise=True))

    def prepare(self, options: VideoOptions, *, blockwise: bool = False) -> VideoRun:
        """Check all options and build the run, before work starts.

        Args:
            blockwise: the caller wants blocks as soon as they are finished; ``num_frames`` None then means endless.
        """
        if "model" not in vars(self):
            require_memory(
                self._named, self.device, self.dtype, height=options.height, width=options.width,
                num_frames=options.num_frames, **self.execution.dtypes, **options.of_rollout,
            )  # fmt: skip
        return VideoRun(self.model, self.execution, options, blockwise)


def rollout_config(model: VideoModel, options: VideoOptions, blockwise: bool = False) -> RolloutConfig:
    """The rollout config of the model with the options applied."""
    order = options.order or model.rollout.order
    if options.order is None and order == "step_first":
        if blockwise:
            order = "stream"  # the same result, block by block
        elif options.prompts is None and is_small(model.transformer):
            order = "wavefront"  # the same result, in fewer and larger forwards
    return model.rollout.with_options(**{**options.of_rollout, "order": order})


class VideoRun:
    """One video of :meth:`VideoPipeline.prepare`. Iterate once for the frames, block by block."""

    @own_settings()
    def __init__(
        self, model: VideoModel, execution: ExecutionConfig, options: VideoOptions, blockwise: bool = False
    ) -> None:
        self.options = options
        endless = blockwise and options.num_frames is None and not options.open_end and options.last_frame is None
        blockwise = blockwise or options.open_end
        self.model = model.sized(options.height, options.width)
        self.config = rollout_config(self.model, options, blockwise)
        self.fps = float(self.model.fps if options.fps is None else options.fps)
        self.threads = fitting_threads(self.model.transformer, requested=options.threads)
        if endless or options.open_end:
            self.config.require_endless("a video with a session" if options.open_end else "a video without num_frames")
        networks = self.model.networks(len(self.config.steps))
        self.starts = Starts.read(self.model, self.fps, options.image, options.extend, options.last_frame)
        self.conditioning = self.starts.first
        if options.session is not None:  # before numbers of frames are told that do not fit other pictures
            require_same_run(options.session, self.facts())
        plan = Plan.of(self.config, self.starts.prefix_frames(self.model))
        latent_frames = self._latent_frames(options.num_frames, endless, plan.prefix_frames)
        self.num_frames = None if latent_frames is None else self.model.pixel_frames(latent_frames)
        length = None if options.open_end else latent_frames
        self.ending = Ending.of(self.model, plan, latent_frames, execution) if self.starts.last else None
        if self.ending is not None:
            length = max(self.ending.rolled_out, plan.prefix_frames + plan.frames_per_block)
        self.frames = self.starts.conditioning_frames(self.model, plan, None if options.open_end else latent_frames)
        self.prefix = self.starts.prefix(self.model)
        self.prompts: EncodedPromptSchedule | None = None
        prompt_embeds = self._prompt_embeds(plan, length)
        self.rollout = Rollout(
            networks,
            prompt_embeds,
            self.config,
            execution,
            num_latent_frames=length,
            latent_size=self.model.latent_size[1:],
            seed=options.seed,
            prefix=self.prefix,
            conditioning_frames=self.frames if self.ending is None else self.ending.ahead(self.frames),
        )
        me = weakref.proxy(self)  # no reference cycle: a dropped run frees its caches at once
        if options.on_progress is not None or self.model.adapters is not None:
            self.rollout.on_task = lambda done, _: me._after_tasks(done)
        self.rollout.on_boundary = lambda block: me._boundary(block)
        self.on_progress, self.frames_done, self.session, self._ends = options.on_progress, 0, options.session, False
        self.decoding: Decoding | None = None
        if options.session is not None:
            self.decoding = Decoding(self.model.decoder())
            session = load_session(options.session, self.rollout, self.decoding.stateful, self.facts())
            self.frames_done = whole(f"{session.path}: frames", session.about.get("frames"), 0)
        self._last = self._last_block(options.num_frames, options.session) if options.open_end else None
        self.metadata = describe(self)
        self.follow_scales = ScaleFollower(self.model, self.rollout, self.metadata)
        self.run_folder = None if options.run_folder is None else self._open_folder(options.run_folder)

    @property
    def makes_frames(self) -> bool:
        """Whether this process yields frames: the last rank of a pipeline, the first of those that share heads."""
        return self.rollout.heads[0] == 0 and self.rollout.makes_blocks

    def __iter__(self) -> Iterator[Frames]:
        """Frames block by block, uint8 [f, H, W, 3].

        Raises:
            FloatingPointError: latents that are not finite, or black frames; names step and block.
        """
        with closing(self._generate()) as blocks:
            while True:
                with own_settings(), cpu_threads(self.threads):
                    frames = next(blocks, None)
                if frames is None:
                    return
                yield frames

    def _generate(self) -> Generator[Frames, None, None]:
        decoding = self.decoding = self.decoding or Decoding(self.model.decoder())
        if self.conditioning is not None and self.session is None and self.makes_frames:
            assert self.prefix is not None
            decoding.skip(self.prefix)
            self.frames_done = len(self.conditioning.frames)
            yield self.conditioning.frames
        for block in self._blocks():
            if self.makes_frames:
                yield from map(self._checked, decoding.put(block.block, block.latents))
            if self._ends or block.block == self._last:
                break
        yield from map(self._checked, decoding.flush())

    def _checked(self, decoded: tuple[int, Frames]) -> Frames:
        block, frames = decoded
        first, self.frames_done = self.frames_done, self.frames_done + len(frames)
        if not frames.any():
            step, last = len(self.config.steps) - 1, self.frames_done - 1
            raise FloatingPointError(f"frames {first} to {last} are all black: step {step}, block {block}")
        self._report(self.rollout.forwards_done)
        return frames

    def end(self) -> None:
        """End the iteration after the current block; may be called from a signal handler."""
        self._ends = True

    @own_settings()
    def save_session(self, path: str | os.PathLike[str]) -> Path:
        """Save a session between two blocks: see :func:`hiar_model.save_session`."""
        if self.decoding is None:
            raise ValueError("nothing to save: a session can be saved after the first block")
        return save_session(path, self.rollout, self.decoding.stateful, {**self.facts(), "frames": self.frames_done})

    def facts(self) -> dict[str, Any]:
        """JSON facts that a session and the run that resumes it must share."""
        loras = [[lora.sha256, lora.scale] for lora in self.model.loras]
        same = {"weights_sha256": self.model.weights_sha256, "seed": self.options.seed}
        vae = {} if self.model.decoded_by is None else {"vae": self.model.decoded_by["vae"]}
        return {**same, **vae, "lora": loras, PICTURES: self.starts.sha256}

    def notes(self) -> list[str]:
        """Lines of output: when changing prompts take effect, and the delay of a live change; what is infilled."""
        if self.ending is not None:
            return [self.ending.note(self.model)]
        if self.prompts is None:
            return []
        plan, pipeline = self.rollout.plan, self.rollout.pipeline
        if plan.order == "step_first":
            return self.prompts.summary()
        ranks = 1 if pipeline is None else len([n for n in pipeline.stage.split if n])
        return [*self.prompts.summary(), str(prompt_delay(plan, ranks, self.options.on_prompt_change))]

    def _latent_frames(self, num_frames: int | None, endless: bool, prefix: int) -> int | None:
        """Latent frames of the video; None: endless."""
        if num_frames is not None:
            return self.model.latent_frames(num_frames, prefix)
        usual = self.model.num_frames if self.starts.last is None else self.model.train_frames
        return None if endless else prefix + self.model.latent_frames(usual)

    def _last_block(self, num_frames: int | None, session: str | os.PathLike[str] | None) -> int:
        """The last block of this iteration, for ``open_end``."""
        plan, block, done = self.rollout.plan, self.config.frames_per_block, self.rollout.blocks_done
        assert self.num_frames is not None
        if session is not None and num_frames is None:
            more = self.model.latent_frames(self.model.num_frames)
            self.num_frames = self.model.pixel_frames(plan.block_frames(done - 1)[1] + more)
        latent = self.model.latent_frames(self.num_frames, plan.prefix_frames)
        last = plan.prefix_blocks + (latent - plan.prefix_frames) // block - 1
        if last < done and session is not None:
            frames = self.model.pixel_frames(plan.block_frames(done - 1)[1])
            raise ValueError(f"num_frames must be more than the {frames} of {os.fspath(session)}, got {num_frames}")
        return last

    def _prompt_embeds(self, blocks: Plan, latent_frames: int | None) -> Tensor | Callable[[int], Tensor]:
        """Embeddings of the one prompt, or of each block's."""
        prompt, prompts = self.options.prompt, self.options.prompts
        if prompts is None or isinstance(prompts, LivePrompts):
            return prompts or self.model.encode_text(prompt)  # type: ignore[arg-type]  # refuses None by name

        def start(n: int) -> float:
            return self.model.pixel_frames(blocks.block_frames(n)[0]) / self.fps

        num_blocks = None if latent_frames is None else blocks.block_of(latent_frames - 1) + 1
        schedule = prompts.from_start(prompt)
        self.prompts = EncodedPromptSchedule.encoded(schedule, self.model.encode_text, start, num_blocks)
        return self.prompts

    def _blocks(self) -> Iterator[FinishedBlock]:
        """The stored blocks of an interrupted run, then the new ones; before a last frame, the infilled ones."""
        if self.ending is not None:
            yield from self.ending.blocks(self.model, self.rollout, self.prefix, self.frames)
        elif self.run_folder is None:
            for finished in self.rollout:
                yield finished
                self.follow_scales()  # which the caller may have changed since
        else:
            stored = self.run_folder.resume(self.rollout)
            for block in range(self.rollout.plan.prefix_blocks, stored if self.makes_frames else 0):
                yield self.run_folder.load_block(block)
            for finished in self.rollout:
                self.run_folder.save_block(finished)
                yield finished

    def _open_folder(self, folder: str | os.PathLike[str]) -> RunFolder:
        pipeline = self.rollout.pipeline
        if pipeline is None:
            raise ValueError("resume and run_folder are for pipelines only: give --parallel pipeline")
        names = ("prompt", "prompts", "weights_sha256", "height", "width", "given", "num_frames", "seed", "noise",
                 "rollout", "dtype")  # fmt: skip
        about = {name: self.metadata[name] for name in names} | {"steps_per_rank": list(pipeline.stage.split)}
        about |= {"lora": self.metadata["lora"]} if "lora" in self.metadata else {}
        return RunFolder(
            folder, about, resume=self.options.resume, every=self.options.checkpoint_every, group=pipeline.group
        )

    def _boundary(self, block: int) -> None:
        if self.run_folder is not None:
            self.run_folder.boundary(self.rollout, block)

    def _after_tasks(self, forwards_done: int) -> None:
        self._report(forwards_done)
        self.follow_scales()

    def _report(self, forwards_done: int) -> None:
        if self.on_progress is not None:
            total = self.rollout.forwards_total if self.ending is None else None  # infilling has other forwards
            self.on_progress(self.frames_done, self.num_frames, forwards_done, total)


@video_options("Video")
def generate(
    prompt: str | None,
    *,
    model: str | os.PathLike[str] | VideoModel = "toy",
    execution: ExecutionConfig | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Video:
    """Generate a video of a prompt: ``VideoPipeline(model, execution, device=device, dtype=dtype)(prompt, ...)``.

    The same arguments give the same video.

    Raises:
        ValueError: one line with the illegal option, its value and the legal values, before work starts.
        FloatingPointError: latents that are not finite, or black frames; names step and block.

    Example:
        >>> from hiar_model import generate
        >>> generate("a red circle moving right", num_frames=12, steps=2, device="cpu").frames.shape
        (12, 32, 32, 3)
    """
    return VideoPipeline(model, execution, device=device, dtype=dtype)(prompt, **options)


@video_options("Iterator[Frames]")
def stream(
    prompt: str | None,
    *,
    model: str | os.PathLike[str] | VideoModel = "toy",
    execution: ExecutionConfig | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Iterator[Frames]:
    """Yield a video block by block, uint8 [f, H, W, 3] each: :meth:`VideoPipeline.stream`.

    ``num_frames`` None: endless. The options are checked at the call, work starts with the first ``next``.
    """
    return VideoPipeline(model, execution, device=device, dtype=dtype).stream(prompt, **options)
