"""One prompt, seed and noise in several orders: a video side by side, and how each order keeps its quality."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiar_kernels.nvtx import span

from ..common.checks import whole
from ..common.settings import own_settings
from ..config import ExecutionConfig, RolloutConfig
from ..config.rollout import several_orders
from ..evaluation.evaluate import steady_cost
from ..evaluation.quality import LABELS, ORDER_COLOURS, PARTS, QualityMeter, ordinal
from ..io.captions import MISSING, CaptionedGrid
from ..io.files import check_output
from ..io.plot import Lines, Series, save_plot
from ..io.video import Frames, VideoWriter, check_target, is_folder_target, upscale
from ..models.threads import cpu_threads, is_small
from ..models.video_model import VideoModel, pick_device, pick_dtype
from ..planning.free_memory import require_memory
from ..schedule.plan import Plan
from ..toy.oracle import ToyOracle
from .metadata import describe
from .video_pipeline import Progress, VideoOptions, VideoPipeline, VideoRun, video_options

CLEAN, MATCHED = "block_first", "stream"
"""The orders compared by default: Self-Forcing's, and HiAR's as it finishes block by block."""
CONTEXT = {CLEAN: "clean context (Self-Forcing)"}
MATCHED_CONTEXT = "context at matched noise (HiAR)"
TRAINED = {True: 32, False: 8}
"""Default length in lengths of a training clip: of a toy, and of a model that takes longer."""
SPEED, LEAST_SHOWN = 8, 48  # default: so fast at most, and so many frames shown at least
PANEL_SIDE = 320  # pixels on the short side that each video is enlarged to


NOT_COMPARED = (
    "order", "fuse_cache_denoise", "session", "open_end", "run_folder", "resume", "checkpoint_every", "last_frame",
)  # fmt: skip
"""Options of one video that a comparison does not have."""


@dataclass(frozen=True)
class OrderResult:
    """One order of a comparison.

    Attributes:
        forwards: of the network for a block, once the window is full.
        seconds: spent on its frames.
        quality: by name (:data:`hiar_model.evaluation.quality.LABELS`), the mean of each stretch of the video.
    """

    order: str
    rollout: RolloutConfig
    forwards: float
    seconds: float
    quality: dict[str, tuple[float, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        quality = {name: [round(x, 6) for x in values] for name, values in self.quality.items()}
        about = {"rollout": self.rollout.to_dict(), "forwards_per_block": self.forwards}
        return {"order": self.order, **about, "seconds": round(self.seconds, 3), "quality": quality}


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`: the video's path and that of the plot of quality; frames made and shown.
    ``notes``: lines about what the pictures could not show.
    """

    path: Path
    plot: Path
    num_frames: int
    frames_shown: int
    speed: int
    fps: float
    orders: tuple[OrderResult, ...]
    notes: tuple[str, ...] = ()


@video_options("Comparison", NOT_COMPARED)
def compare(
    prompt: str | None,
    out: str | os.PathLike[str],
    *,
    orders: Sequence[str] | None = None,
    model: str | os.PathLike[str] | VideoModel = "scenes",
    speed: int | None = None,
    execution: ExecutionConfig | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    overwrite: bool = True,
    **options: Any,
) -> Comparison:
    """Make a prompt's video in several orders and write them side by side, with captions and a frame counter.

    Weights, seed and noise are the same; only the context differs: block_first sees the finished past, the other orders
    see it at their own noise level. Beside the video lie a plot of each order's quality by eighths (``out`` with
    ``.drift.png`` for its suffix; in a folder of PNG files ``drift.png``), and the metadata, with the same figures and
    the command that repeats it. Frames are written as they come: memory does not grow with the length, except with
    order step_first, which finishes all its blocks at the end. The orders take turns, so that the caches of all of
    them are in memory.

    Args:
        prompt: what to show. out: name.mp4, name.gif, or name/ for PNG files; an existing file is replaced.
        orders: two or more, left to right; None: block_first and HiAR's, as stream (wavefront for a small model on a
            CPU: the same result sooner).
        speed: only every so many-th frame is shown; None: 8, or less where fewer than 48 frames would be left.
        model, execution, device, dtype: of :class:`hiar_model.VideoPipeline`. "scenes", the default, is the shipped
            model whose world lets errors pile up; with "toy" no order drifts much.
        overwrite: False: what another process writes to ``out`` meanwhile stays, and this comparison is beside it.
        num_frames: pixel frames of each; None: 32 times the training length of a toy, 8 times that of other models.
        options: the others are those of :func:`hiar_model.generate`.

    Raises:
        ValueError: one line with the illegal option, its value and the legal values, before work starts.
        FloatingPointError: latents that are not finite, or black frames; names step and block.

    Example:
        >>> import tempfile, hiar_model
        >>> out = tempfile.mkdtemp() + "/compare.mp4"
        >>> result = hiar_model.compare("a red circle moving right", out, num_frames=24, steps=2, device="cpu")
        >>> [(each.order, each.forwards) for each in result.orders]
        [('block_first', 3), ('wavefront', 4)]
        >>> len(result.orders[0].quality["valid"])
        8
    """
    for name in NOT_COMPARED:
        if name in options:
            raise ValueError(f"{name} is no option of compare{': give orders' * (name == 'order')}")
    target = check_target(out)
    if not is_folder_target(out):
        check_output(plot_path(target))
    checked = VideoOptions(prompt, **options)
    orders = None if orders is None else several_orders("orders", orders)
    pipeline = _pipeline(model, execution, device, dtype, checked, orders)
    orders = default_orders(pipeline.model) if orders is None else orders
    num_frames = checked.num_frames or default_frames(pipeline.model)
    report = _Progress(len(orders), checked)
    runs = [
        pipeline.prepare(replace(checked, order=order, num_frames=num_frames, on_progress=report.of(i)), blockwise=True)
        for i, order in enumerate(orders)
    ]
    with span("compare"), own_settings(), cpu_threads(runs[0].threads):
        return _write(runs, out, speed, overwrite)


def default_orders(model: VideoModel) -> tuple[str, str]:
    """Clean context, and context at matched noise in the order that is fastest where the model runs."""
    return CLEAN, "wavefront" if is_small(model.transformer) else MATCHED


def default_frames(model: VideoModel) -> int:
    """Pixel frames of a comparison without ``num_frames``."""
    latent = model.latent_frames(model.train_frames) * TRAINED[model.world is not None]
    return model.pixel_frames(latent)


def plot_path(target: Path, folder: bool = False) -> Path:
    """Where the plot of quality lies: beside the video, or inside its folder."""
    return target / "drift.png" if folder else target.with_name(f"{target.stem}.drift.png")


def drift_panels(results: Sequence[OrderResult], title: str = "") -> list[Lines]:
    """Quality by stretches of the video: a panel for each measure, a line for each order."""
    panels: list[Lines] = []
    for name in results[0].quality:
        percent = 100 if name == "valid" else 1
        lines = [
            Series(result.order, range(1, 1 + len(values)), [percent * x for x in values], ORDER_COLOURS[result.order])
            for result in results
            for values in [result.quality[name]]
        ]
        highest = max(LEAST_TOP.get(name, 0.0), *(percent * 1.0 if name == "valid" else max(line.y) for line in lines))
        label = f"{ordinal(len(lines[0].y))} of the video"
        panels.append(
            Lines(
                LABELS[name],
                lines,
                label,
                "% of frames" if name == "valid" else "",
                y_range=(0.0, highest),
                points=True,
            )
        )
    if title:
        panels[0] = replace(panels[0], title=f"{LABELS[next(iter(results[0].quality))]}: {title}")
    return panels


LEAST_TOP = {"change": 0.05}
"""The top of an axis is here at least: below it lies what motion alone does."""


def _pipeline(
    model: str | os.PathLike[str] | VideoModel,
    execution: ExecutionConfig | None,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    o: VideoOptions,
    orders: Sequence[str] | None,
) -> VideoPipeline:
    """With its model loaded, if the videos of all orders fit the free memory together."""
    first, *others = orders or (MATCHED, CLEAN)
    require_memory(
        model, pick_device(device), pick_dtype(dtype), height=o.height, width=o.width, num_frames=o.num_frames,
        **(execution or ExecutionConfig()).dtypes, beside=others, **{**o.of_rollout, "order": first},
    )  # fmt: skip
    pipeline = VideoPipeline(model, execution, device=device, dtype=dtype)
    assert pipeline.model is not None  # loaded here
    return pipeline


class _Progress:
    """One progress of all runs: forwards done and in all; frames of the one that is behind."""

    def __init__(self, count: int, options: VideoOptions) -> None:
        self.on_progress = options.on_progress
        self.done: list[tuple[int, int | None, int, int | None]] = [(0, None, 0, None)] * count

    def of(self, number: int) -> Progress | None:
        if self.on_progress is None:
            return None

        def report(frames: int, frames_total: int | None, forwards: int, forwards_total: int | None) -> None:
            assert self.on_progress is not None
            self.done[number] = (frames, frames_total, forwards, forwards_total)
            # Before a run has begun it does not say how much it has to do.
            known = [total for *_, total in self.done if total is not None]
            total = sum(known) * len(self.done) // len(known) if known else None
            forwards_done = sum(forwards for *_, forwards, _ in self.done)
            self.on_progress(min(frames for frames, *_ in self.done), frames_total, forwards_done, total)

        return report


def _write(runs: Sequence[VideoRun], out: str | os.PathLike[str], speed: int | None, overwrite: bool) -> Comparison:
    first = runs[0]
    model, num_frames = first.model, first.num_frames
    assert num_frames is not None
    if speed is None:
        speed = max(1, min(SPEED, num_frames // LEAST_SHOWN))
    speed = whole("speed", speed, 1, most=num_frames)
    prompt = first.options.prompt if first.prompts is None else None
    oracle = None if model.world is None or prompt is None else ToyOracle(model.world)
    parts = min(PARTS, num_frames)
    watched = [_Watched(run, QualityMeter(num_frames, parts, oracle, prompt)) for run in runs]
    size = upscale(np.zeros((1, *model.pixel_size, 3), np.uint8), PANEL_SIDE).shape[1:3]
    captions = [
        (CONTEXT.get(run.config.order, MATCHED_CONTEXT), f"{run.config.order}, {each.forwards:g} forwards a block")
        for run, each in zip(runs, watched, strict=True)
    ]
    title = prompt if prompt is not None else f"{first.metadata['prompt']} ..."
    grid = CaptionedGrid(title, captions, size)
    pace = "" if speed == 1 else f"; at {speed}x speed"
    orders = json.dumps([run.config.order for run in runs])
    metadata = describe(first, "compare", {"order": orders, "speed": speed}) | {"speed": speed}
    del metadata["rollout"]  # of each order below
    height, width = grid.canvas.height, grid.canvas.width
    smooth = size != model.pixel_size
    options: dict[str, Any] = {"least_side": 1, "size": (height, width), "smooth": smooth, "overwrite": overwrite}
    with VideoWriter(out, first.fps, metadata, **options) as writer:
        for number, images in enumerate(zip(*watched, strict=True)):
            if number % speed == 0:
                large = [upscale(image[None], PANEL_SIDE)[0] for image in images]
                counter = f"frame {number + 1} of {num_frames}, {number / first.fps:.1f} s{pace}"
                writer.write(grid.compose(large, counter)[None])
        results = tuple(each.result() for each in watched)
        writer.metadata["orders"] = [result.to_dict() for result in results]
    try:
        plot = plot_path(writer.path, writer.folder)
        panels = drift_panels(results, title)
        save_plot(panels, plot, columns=2 if len(panels) < 5 else 3)
    except OSError as error:
        raise OSError(f"{writer.path} is complete, but without its plot: {error}") from error
    lost = f"no font here has the letters {grid.missing} of the caption: they are shown as {MISSING}; install Noto Sans"
    notes = (lost,) if grid.missing else ()
    return Comparison(writer.path, plot, num_frames, writer.frames_written, speed, first.fps, results, notes)


class _Watched:
    """The frames of a run one by one, uint8 [H, W, 3]; measured, and the time that they took."""

    def __init__(self, run: VideoRun, meter: QualityMeter) -> None:
        self.run, self.meter, self.seconds = run, meter, 0.0
        self.forwards = steady_cost(Plan.of(run.config))["forwards"]

    def __iter__(self) -> Iterator[Frames]:
        blocks = iter(self.run)
        while True:
            start = time.perf_counter()
            block = next(blocks, None)
            self.seconds += time.perf_counter() - start
            if block is None:
                return
            self.meter.add(block)
            yield from block

    def result(self) -> OrderResult:
        config = self.run.config
        quality = {name: tuple(values) for name, values in self.meter.by_part().items()}
        return OrderResult(config.order, config, self.forwards, self.seconds, quality)
