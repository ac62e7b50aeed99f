"""`hiar compare`: the same weights, seed and noise in several orders, side by side."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from ..config.rollout import several_orders
from .choices import moved, refuse_existing, rollout_options
from .generate import new_video, prompt_schedule, read_files, video_arguments
from .machine import imports, linear_argument, load_for_video, progress_bar

if TYPE_CHECKING:
    from ..pipelines.compare import Comparison


def compare_arguments(parser: ArgumentParser) -> None:
    """Options of `hiar compare`."""
    video_arguments(parser, model="scenes")
    linear_argument(parser)
    parser.add_argument(
        "--num-frames", type=int,
        help="pixel frames of each; default: 32 times the training length of a toy, 8 times that of other models",
    )  # fmt: skip
    parser.add_argument(
        "--order", type=list[str] | str | None,
        help="two or more, left to right, as [block_first,stream]; default: block_first, and HiAR's: stream, or "
        "wavefront (the same result) if the model is small and on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--speed", type=int,
        help="only every so many-th frame is shown; default: 8, or less where fewer than 48 would be left",
    )  # fmt: skip


def compare(a: Namespace) -> None:
    """Make the videos, all in this process."""
    from ..io.files import require_apart
    from ..io.video import is_folder_target, record_path

    target, folder = new_video(a), is_folder_target(a.out)
    prompts = prompt_schedule(a)
    with imports():
        from ..config import ExecutionConfig
        from ..pipelines.compare import compare as make
        from ..pipelines.compare import plot_path

    plot, metadata = plot_path(target, folder), record_path(target, folder)
    for file in (plot, metadata):
        refuse_existing("", file, a.overwrite)
    require_apart(
        {"-o": target, "the metadata of -o": metadata, "the plot of -o": plot},
        read_files(a),
    )
    orders = None if a.order is None else several_orders("order", a.order)
    first, *others = orders or ("stream", "block_first")
    model = load_for_video(a, order=first, beside=others, on_checkpoint=lambda line: print(line, file=sys.stderr))
    of_rollout = {name: value for name, value in rollout_options(a).items() if name != "order"}
    start = time.perf_counter()
    with progress_bar("{task.fields[frames]}", "{task.fields[speed]}") as bar:
        task = bar.add_task("", total=None, frames="frames", speed="")

        def show(frames: int, frames_total: int | None, forwards: int, forwards_total: int | None) -> None:
            rate = forwards / (time.perf_counter() - start)
            fields = {"frames": f"frames {frames}/{frames_total}", "speed": f"{rate:.1f} forwards/s"}
            bar.update(task, total=forwards_total, completed=forwards, **fields)

        result = make(
            a.prompt, a.out, orders=orders, model=model, num_frames=a.num_frames, speed=a.speed,
            execution=ExecutionConfig(
                kv_dtype=a.kv_dtype, attention_dtype=a.attention_dtype, linear_dtype=a.linear_dtype, on_nan=a.on_nan
            ),
            height=a.height, width=a.width, seed=a.seed, fps=a.fps, image=a.image, extend=a.extend, prompts=prompts,
            threads=a.threads, on_progress=show, overwrite=a.overwrite, **of_rollout,
        )  # fmt: skip
    for note in [*result.notes, *([moved(target, result.path)] if result.path != target else [])]:
        print(note, file=sys.stderr)
    _print(result, time.perf_counter() - start)


def _print(result: Comparison, seconds: float) -> None:
    """What was written, and the quality of each order by stretches of the video."""
    shown = (
        f"{result.frames_shown} of {result.num_frames} frames" if result.speed > 1 else f"{result.num_frames} frames"
    )
    length = f"{result.frames_shown / result.fps:.1f} s at {result.fps:g} fps"
    print(f"{result.path}: {shown}, {length}; made in {seconds:.1f} s")
    name = "valid" if "valid" in result.orders[0].quality else "change"
    label = {"valid": "valid frames %", "change": "change of colours since the first block, %"}[name]
    print(
        f"{label}, from the first to the last of {len(result.orders[0].quality[name])} stretches (plot: {result.plot})"
    )
    width = max(len(each.order) for each in result.orders)
    for each in result.orders:
        values = " ".join(f"{100 * x:{'3.0f' if name == 'valid' else '5.1f'}}" for x in each.quality[name])
        print(f"  {each.order:{width}}  {each.forwards:g} forwards a block, {each.seconds:.1f} s   {values}")
