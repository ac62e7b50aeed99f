"""The command `hiar`. Only what a command needs is imported, when it runs: `hiar --help` does not wait for torch."""

from __future__ import annotations

import os
import sys
import time
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from .cli_machine import load_model, machine_arguments, progress_bar
from .cli_parallel import (
    KEPT,
    job,
    keeping_arguments,
    launch,
    parity_arguments,
    pipeline_arguments,
    verify_parity,
)
from .cli_performance import (
    bench_report,
    profile,
    profile_arguments,
    report_arguments,
    warmup,
    warmup_arguments,
)
from .cli_toy import evaluate, evaluate_arguments
from .cli_train import train, train_arguments
from .cli_wan import convert, convert_arguments, doctor, doctor_arguments
from .version import package_version

if TYPE_CHECKING:
    from .cli_parallel import Job

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130


def build_parser() -> ArgumentParser:
    """The whole command line; an unknown option or key is refused."""
    parser = ArgumentParser(
        prog="hiar",
        description="Long video by hierarchical denoising.",
        version=package_version(),
        exit_on_error=False,
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, (add_arguments, _, summary) in COMMANDS.items():
        command = ArgumentParser(description=summary, exit_on_error=False)
        command.add_argument("--config", action="config", metavar="FILE", help="YAML file with options of this command")
        add_arguments(command)
        commands.add_subcommand(name, command, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``argv`` None: the process's) and return the exit code: 0, 2 for a mistake in what was
    asked, 1 for a result that is not finite or black, 130 for Ctrl-C. A failure is one line on stderr.
    """
    debug = False
    try:
        arguments = build_parser().parse_args(argv)
        debug = arguments.debug
        chosen = arguments[arguments.subcommand]
        if chosen.get("nproc", 1) > 1 and "LOCAL_RANK" not in os.environ:
            return launch(sys.argv[1:] if argv is None else argv, chosen.nproc)
        COMMANDS[arguments.subcommand][1](chosen)
        return 0
    except KeyboardInterrupt as error:
        return _fail("interrupted" + "".join(f"; {detail}" for detail in error.args), INTERRUPTED, debug)
    except FloatingPointError as error:
        return _fail(error, FAILED, debug)
    except ArgumentError as error:
        return _fail(f"{error}{_hint(str(error))}", WRONG_INPUT, debug)
    except (ValueError, OSError) as error:
        return _fail(error, WRONG_INPUT, debug)


def _hint(message: str) -> str:
    """argparse before Python 3.12 takes no key=value behind an option: say where it goes."""
    _, unrecognized, words = message.partition("unrecognized arguments: ")
    misplaced = unrecognized and any("=" in word and not word.startswith("-") for word in words.split())
    return "; key=value stands right behind the recipe, before options" if misplaced else ""


def _fail(message: object, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("hiar:", " ".join(str(message).split()), file=sys.stderr)
    return code


# hiar generate


def _generate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("prompt", type=str, help='such as "a red circle moving right"')
    parser.add_argument("-o", "--out", type=str, required=True, help="name.mp4, name.gif, or name/ for PNG files")
    parser.add_argument("--model", type=str, default="toy", help="name of a shipped model, or a folder")
    parser.add_argument("--num-frames", type=int, help="pixel frames; default: what the model says")
    parser.add_argument("--seed", type=int, default=0, help="of all noise")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's own")
    parser.add_argument("--order", type=str, default="step_first", help="step_first, stream, wavefront or block_first")
    parser.add_argument(
        "--window-frames",
        type=int | list[int | None] | None | Literal["model"],
        default="model",
        help="latent frames a block sees, its own among them: a number, one per step as [6,9,12,12], or null for all",
    )
    parser.add_argument("--sink-frames", type=int, help="first frames that always stay visible")
    parser.add_argument("--fps", type=float, help="of the video; default: the model's")
    machine_arguments(parser)
    pipeline_arguments(parser)
    keeping_arguments(parser)


def _generate(a: Namespace) -> None:
    kept = a.out.rstrip("/") + KEPT
    with job(a, kept) as here:
        _generate_here(a, here, kept)


def _generate_here(a: Namespace, here: Job, kept: str) -> None:
    from .video import VideoWriter, check_target

    check_target(a.out)
    from hiar_kernels.nvtx import span

    from .generation import Generation

    options = here.options(a)
    model = load_model(a)
    with progress_bar("{task.fields[frames]}", "{task.fields[speed]}") as bar:
        task = bar.add_task("", total=None, frames="frames", speed="")
        begun = time.perf_counter()

        def show(frames: int, frames_total: int | None, forwards: int, forwards_total: int | None) -> None:
            assert frames_total is not None and forwards_total is not None
            speed = frames_total * forwards / forwards_total / (time.perf_counter() - begun)
            told = {"frames": f"frames {frames}/{frames_total}", "speed": f"{speed:.1f} fps"}
            bar.update(task, total=forwards_total, completed=forwards, **told)

        run = Generation(
            a.prompt, model=model, num_frames=a.num_frames, seed=a.seed, steps=a.steps, order=a.order,
            window_frames=a.window_frames, sink_frames=a.sink_frames, fps=a.fps, on_progress=show,
            keep=kept if a.resume or options["executor"].startswith("pipeline") else None, resume=a.resume,
            checkpoint_every=a.checkpoint_every, **options,
        )  # fmt: skip
        begun = time.perf_counter()
        if not run.shows:
            for _ in run:
                pass
            return
        with span("generate"), VideoWriter(a.out, run.fps, run.metadata) as writer:
            for frames in run:
                writer.write(frames)
    if run.kept is not None:
        run.kept.remove()
    seconds, made = time.perf_counter() - begun, writer.frames_written
    told = f"{made} frames, {made / run.fps:.1f} s at {run.fps:g} fps"
    print(f"{writer.path}: {told}; made in {seconds:.1f} s ({made / seconds:.1f} fps)")


Command = tuple[Callable[[ArgumentParser], None], Callable[[Namespace], None], str]
COMMANDS: dict[str, Command] = {
    "generate": (_generate_arguments, _generate, "Make a video of a prompt."),
    "train": (train_arguments, train, "Train by a recipe, here or under torchrun; the same command resumes."),
    "evaluate": (evaluate_arguments, evaluate, "Measure how well a toy model's videos keep their prompts."),
    "verify-parity": (parity_arguments, verify_parity, "Compare a pipeline of processes with one, bit for bit."),
    "warmup": (warmup_arguments, warmup, "Compile and capture ahead for a size; say what a cold start costs."),
    "profile": (profile_arguments, profile, "Say where the time of a rollout goes, beside the machine's limits."),
    "bench-report": (report_arguments, bench_report, "Say what more GPUs gain: measured, and by the simulator."),
    "convert": (convert_arguments, convert, "Write weights in another layout, and prove that nothing changed."),
    "doctor": (doctor_arguments, doctor, "Say what is installed and would run; with --model, what memory it takes."),
}
