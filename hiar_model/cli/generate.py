"""`hiar generate`: a prompt, or a prompt schedule, to a video file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from ..common.image_file import image_files
from ..common.lora_file import lora_files
from ..io.files import as_text, check_text
from .choices import (
    moved,
    option,
    overwrite_argument,
    refuse_existing,
    refuse_other_metadata,
    rollout_options,
    unused_now,
)
from .config_file import OptionalPositional, Repeated
from .machine import (
    imports,
    load_for_video,
    lora_argument,
    machine_arguments,
    memory_arguments,
    progress_bar,
    size_arguments,
)
from .parallel import RUN_FOLDER, job, pipeline_arguments, pipelined, resume_arguments, unfinished_blocks
from .signals import handled

if TYPE_CHECKING:
    from ..pipelines.video_pipeline import VideoRun
    from .parallel import Job


def video_arguments(parser: ArgumentParser, model: str = "toy") -> None:
    """Options of one video, shared with `hiar compare`, which has another default ``model``."""
    parser.add_argument(
        "prompt", action=OptionalPositional, type=str, nargs="?",
        help='such as "a red circle moving right"; or give --prompts',
    )  # fmt: skip
    parser.add_argument("-o", "--out", type=str, required=True, help="name.mp4, name.gif, or name/ for PNG files")
    overwrite_argument(parser)
    parser.add_argument("--model", type=str, default=model, help="name of a shipped model, or a folder, such as of Wan")
    parser.add_argument(
        "--checkpoint", type=str,
        help="in place of a Wan folder's own: hiar.pt, .safetensors, .gguf, a folder; by step, 0-1=high.pt,2-3=low.pt",
    )  # fmt: skip
    parser.add_argument(
        "--vae", type=str, help="of Wan, in place of the folder's: the small one, taew2_1.pth; or a full one"
    )
    lora_argument(parser, "several times for several files")
    size_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of all noise")
    memory_arguments(parser)
    parser.add_argument("--fps", type=float, help="of the video; default: the model's")
    parser.add_argument(
        "--image", action=Repeated, metavar="FILE[@FRAME]",
        help="first frame: a picture, scaled and cropped to the size of the video; with @FRAME, several times for a "
        "storyboard: a picture at a frame at which a block begins",
    )  # fmt: skip
    parser.add_argument("--extend", type=str, help="first frames: a clip, of which the last 1 + 4n frames are used")
    parser.add_argument("--prompts", type=str, help='file of lines "seconds prompt", counted from the video\'s start')
    parser.add_argument("--on-prompt-change", type=str, default="keep", help="context at a new prompt: keep or recache")
    parser.add_argument("--on-nan", type=str, default="stop", help="latents that are not finite: stop or retry")
    machine_arguments(parser)
    parser.add_argument("--prompt-cache", type=str, help="folder that keeps embeddings of prompts (Wan)")


def generate_arguments(parser: ArgumentParser) -> None:
    """Options of `hiar generate`."""
    video_arguments(parser)
    parser.add_argument(
        "--num-frames", type=int, help="pixel frames from the video's start; default: what the model says"
    )
    parser.add_argument("--last-frame", type=str, help="picture that the video ends with; it is infilled")
    parser.add_argument(
        "--order", type=str,
        help="step_first, stream, wavefront or block_first; default: the model's, else wavefront if it is small and on "
        "a CPU, else step_first",
    )  # fmt: skip
    parser.add_argument(
        "--session",
        type=str,
        help="file to resume from, written at the end, or at Ctrl-C or SIGTERM (not step_first)",
    )
    parser.add_argument("--from-session", type=str, help="resume such a file; a different prompt makes a fork")
    pipeline_arguments(parser)
    resume_arguments(parser)


def generate(a: Namespace) -> None:
    """Make the video; in a multi-process run, this rank's share."""
    folder = a.out.rstrip("/") + RUN_FOLDER
    with job(a, folder) as here:
        try:
            _generate_here(a, here, folder)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(*error.args, *filter(None, [unfinished_blocks(a.out)])) from error


def _generate_here(a: Namespace, here: Job, folder: str) -> None:
    from ..io.files import SESSION, check_output, in_folder, require_apart
    from ..io.video import VideoWriter, is_folder_target, record_path

    # Validate arguments before loading the model.
    target = new_video(a)
    typed = {} if a.prompt is None or a.prompts is not None else {"prompt": a.prompt}
    _refuse_other_metadata(a, target, {**typed, "seed": a.seed})
    session = None if a.session is None else check_output(in_folder(a.session, SESSION))
    require_apart(
        {"-o": target, "the metadata of -o": record_path(target, is_folder_target(a.out)), "--session": session},
        read_files(a),
    )
    resumed = None if a.from_session is None else in_folder(a.from_session, SESSION)
    if resumed is not None:  # that may be replaced by --session
        require_apart({"-o": target}, {"--from-session": resumed})
    if session is not None and session.is_file() and not a.overwrite and not (resumed and session.samefile(resumed)):
        raise ValueError(
            f"--session {session} exists: give another name, --from-session to go on from it, or --overwrite"
        )
    prompts = prompt_schedule(a)
    with imports():
        from hiar_kernels.nvtx import span

        from ..pipelines.video_pipeline import VideoOptions, VideoPipeline

    notes: list[str] = []
    own_steps = _own_steps(a, here)
    execution, of_rollout = here.execution(a), rollout_options(a)
    piped = a.parallel == "pipeline" or (here.ranks > 1 and a.parallel is None)
    if piped and (a.session or a.from_session) and here.ranks > 1:
        raise ValueError("--session and --from-session are for one process: resume a pipeline with --resume")
    if a.last_frame is not None and piped:
        raise ValueError("--last-frame is for one process without a pipeline: its last blocks are made at once")
    for other in ("session", "from_session", "prompts") if a.last_frame is not None else ():
        if a[other] is not None:
            raise ValueError(f"--last-frame and {option(other)} exclude each other: give one")
    model = load_for_video(a, order=a.order, ranks=here.ranks, own_steps=own_steps, on_checkpoint=notes.append)
    with progress_bar("{task.fields[frames]}", "{task.fields[speed]}") as bar:
        task = bar.add_task("", total=None, frames="frames", speed="")
        start = time.perf_counter()

        def show(frames: int, frames_total: int | None, forwards: int, forwards_total: int | None) -> None:
            assert frames_total is not None
            done, of = (frames, frames_total) if forwards_total is None else (forwards, forwards_total)
            speed = frames_total * done / of / (time.perf_counter() - start)
            fields = {"frames": f"frames {frames}/{frames_total}", "speed": f"{speed:.1f} fps"}
            bar.update(task, total=of, completed=done, **fields)

        options = VideoOptions(
            a.prompt, height=a.height, width=a.width, num_frames=a.num_frames, seed=a.seed, fps=a.fps,
            image=a.image, extend=a.extend, last_frame=a.last_frame, prompts=prompts, threads=a.threads,
            session=a.from_session,
            open_end=bool(a.session or a.from_session), on_progress=show,
            run_folder=folder if a.resume or piped else None, resume=a.resume, checkpoint_every=a.checkpoint_every,
            **of_rollout,
        )  # fmt: skip
        execution, options = pipelined(a, model, execution, options, piped)
        run = VideoPipeline(model, execution).prepare(options)
        start = time.perf_counter()
        if not run.makes_frames:
            for _ in run:
                pass
            return
        for line in [*notes, *(() if a.from_session else run.starts.notes), *run.notes()]:
            print(line, file=sys.stderr)
        writer = VideoWriter(a.out, run.fps, run.metadata, size=run.model.pixel_size, overwrite=a.overwrite)
        _refuse_other_metadata(a, target, json.loads(writer.metadata_text()))  # the model is known now
        with (
            span("generate"),
            writer,
            _interrupts(a.session, run) as interrupted,
        ):
            for frames in run:
                writer.write(frames)
    if run.run_folder is not None:
        run.run_folder.remove()
    seconds, written = time.perf_counter() - start, writer.frames_written
    if writer.path != target:
        print(moved(target, writer.path), file=sys.stderr)
    if a.session is not None:
        assert session is not None
        goes_on = resumed is not None and session.is_file() and session.samefile(resumed)
        saved = unused_now(session, a.overwrite or goes_on)
        try:
            run.save_session(saved)
        except ValueError as error:
            raise ValueError(f"{error}; {writer.path} is complete, {written} frames") from error
    if interrupted():
        resume = a.session if saved == session else saved
        raise KeyboardInterrupt(f"{written} frames are in {writer.path}, resume with --from-session {resume}")
    print(f"{writer.path}: {_summary(run, written, seconds)}")


def _summary(run: VideoRun, written: int, seconds: float) -> str:
    """How much was written, and the speed with and without decoding."""
    assert run.decoding is not None
    fixed = 0 if run.conditioning is None or run.session is not None else len(run.conditioning.frames)
    new = written - fixed
    alone = new / max(seconds - run.decoding.seconds, 1e-9)
    without = "waiting for the VAE, which decodes in parallel" if run.decoding.asynchronous else "decoding"
    by = "" if run.model.decoded_by is None else f" with the {run.model.decoded_by['vae']} VAE"
    speed = f"{new / seconds:.2f} fps{by}; {alone:.2f} fps without {without}"
    length = f"{written} frames, {written / run.fps:.1f} s at {run.fps:g} fps"
    return f"{length}; {f'{new} ' if fixed else ''}made in {seconds:.1f} s ({speed})"


def new_video(a: Namespace) -> Path:
    """The path of -o, if a video can be written there; ValueError for a file without --overwrite."""
    from ..io.video import check_target

    target = check_target(a.out)
    refuse_existing("", target, a.overwrite)
    return target


def _refuse_other_metadata(a: Namespace, target: Path, values: dict[str, Any]) -> None:
    """ValueError for metadata of another video beside -o; in a folder of PNGs there is none."""
    from ..io.video import is_folder_target, record_path

    if not is_folder_target(a.out):
        refuse_other_metadata(record_path(target), as_text(target.name), values, a.overwrite)


def read_files(a: Namespace) -> dict[str, str | Path | None]:
    """The files and folders that the options of a video read, for :func:`.require_apart`."""
    names = ("model", "extend", "last_frame", "prompts", "checkpoint", "vae")
    of_options = {option(name): a.get(name) for name in names}
    of_options |= {f"--image {x.path}": x.path for x in image_files(a.image)}
    return of_options | {f"--lora {x.path}": x.path for x in lora_files(a.lora)}


def prompt_schedule(a: Namespace) -> Any:
    """The prompt schedule; None if there is one prompt."""
    if a.prompt is not None:
        check_text(a.prompt, "the prompt")
    if a.prompts is None:
        if a.prompt is None:
            raise ValueError('required: a prompt, such as "a red circle moving right", or --prompts schedule.txt')
        return None
    from ..pipelines.prompt_schedule import PromptSchedule

    return PromptSchedule.read(a.prompts)


def _own_steps(a: Namespace, here: Job) -> range | None:
    """The steps of this pipeline rank if weights differ by step: divided before any are loaded."""
    from ..models.wan import is_experts

    if not is_experts(a.checkpoint) or here.ranks == 1 or a.parallel == "ulysses":
        return None
    if a.steps_per_rank == "measured":
        raise ValueError("--steps-per-rank must be such as [1,1,2], or count, with weights by step, got measured")
    import torch.distributed as dist

    from ..config import FlowSchedule
    from ..models.experts import steps_of_rank

    if not isinstance(a.steps_per_rank, list):
        steps, ranks = a.steps or len(FlowSchedule()), here.ranks - a.dedicated_decoder_rank
        if not 1 <= ranks <= steps:
            return None  # refused by the pipeline
        split = [steps // ranks + (rank >= ranks - steps % ranks) for rank in range(ranks)]
        a.steps_per_rank = split + [0] * a.dedicated_decoder_rank
    if len(a.steps_per_rank) != here.ranks:
        return None  # refused by the pipeline
    return steps_of_rank(a.steps_per_rank, dist.get_rank())


@contextmanager
def _interrupts(session: str | None, run: VideoRun) -> Iterator[Callable[[], bool]]:
    """With a session, Ctrl-C (or SIGTERM, SIGHUP) ends the video after the current block; a second one ends at once."""
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        run.end()

    with nullcontext() if session is None else handled(interrupt):
        yield lambda: interrupted
