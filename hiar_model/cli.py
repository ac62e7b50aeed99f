"""The command `hiar`. Only what a command needs is imported, when it runs: `hiar --help` does not wait for torch."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

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
from .version import package_version

if TYPE_CHECKING:
    from .bundle import VideoModel
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


def _machine_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is any), cpu, cuda, cuda:1")
    parser.add_argument("--dtype", type=str, help="float32, bfloat16, float16 or float64")
    # Forwards of a toy model are too small to share: two threads gain little, and lose much where the cores are busy.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")


def _load_model(a: Namespace) -> VideoModel:
    import torch

    from .bundle import load_video_model

    if a.threads < 1:
        raise ValueError(f"threads must be at least 1, got {a.threads}")
    torch.set_num_threads(a.threads)
    return load_video_model(a.model, a.device, a.dtype)


def _columns(*columns: Any) -> Any:
    """A progress bar on stderr, shown on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(*columns[:1], BarColumn(), *columns[1:], TimeRemainingColumn(), console=console,
                    disable=not console.is_terminal)  # fmt: skip


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
    _machine_arguments(parser)
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
    model = _load_model(a)
    with _columns("{task.fields[frames]}", "{task.fields[speed]}") as bar:
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


# hiar train


def _train_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", type=str, help="name of a shipped recipe (toy), or a .yaml file")
    parser.add_argument(
        "overrides", type=str, nargs="*", metavar="key=value", help="before options; such as optimizer.matrix_lr=1e-3"
    )
    parser.add_argument("--out", type=str, help="folder of the run, which resumes; default: runs/RECIPE")


def _train(a: Namespace) -> None:
    overrides = dict(_override(text) for text in a.overrides)
    from .bundle import save_toy_model
    from .train.curve import PICTURE, can_draw, draw_loss_curve
    from .train.recipe import load_recipe
    from .train.trainer import CHECKPOINT, LOSSES, ToyTrainer

    recipe = load_recipe(a.recipe, overrides)
    folder = Path(a.out or Path("runs") / Path(a.recipe).stem)
    trainer = ToyTrainer(recipe, folder)
    first, begun, mean = trainer.iteration, time.perf_counter(), 0.0
    if first:
        print(f"going on from iteration {first} of {folder / CHECKPOINT}")
    with _columns("{task.completed}/{task.total}", "{task.fields[told]}") as bar:
        task = bar.add_task("", total=recipe.iterations, completed=first, told="")

        def show(iteration: int, loss: float) -> None:
            nonlocal mean
            seen = iteration - first
            mean += (loss - mean) / min(seen, 100)
            rate = seen / (time.perf_counter() - begun)
            bar.update(task, completed=iteration, told=f"loss {mean:.4f}, {rate:.2f} it/s")

        try:
            trainer.run(show)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"the same command goes on from {folder / CHECKPOINT}, if there is one") from error
    model = save_toy_model(
        folder / "model",
        trainer.averaged_model(),
        trainer.codec,
        schedule=recipe.schedule,
        frames_per_block=recipe.frames_per_block,
        window_frames=recipe.window_frames,
        sink_frames=recipe.sink_frames,
        train_frames=recipe.num_frames,
        world=trainer.world.config,
    )
    if can_draw() and (folder / LOSSES).exists():
        draw_loss_curve(folder / LOSSES, folder / PICTURE)
        print(f"loss curve: {folder / PICTURE}")
    else:
        print(f"no picture of the loss curve: matplotlib is not installed, or {folder / LOSSES} is not there")
    print(f'model: {model}; try: hiar generate "a red circle moving right" -o out.mp4 --model {model}')


def _override(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise ValueError(f"{text!r} is no override: write key=value, such as iterations=100")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value  # a word


# hiar evaluate


def _evaluate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("world", choices=["toy"], help="what the model shows")
    parser.add_argument("--model", type=str, default="toy", help="name of a shipped model, or a folder")
    parser.add_argument("--prompts", type=int, help="how many of the held-out prompts; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of all noise; every prompt has noise of its own")
    parser.add_argument("--num-frames", type=list[int], help="lengths; default: as trained, and 6 times that")
    parser.add_argument("--order", type=list[str], default=["step_first", "block_first"], help="orders to compare")
    parser.add_argument("--batch", type=int, default=16, help="videos made at once; does not change the result")
    parser.add_argument("--json", type=str, help="write the figures there as well")
    _machine_arguments(parser)


def _evaluate(a: Namespace) -> None:
    target = None if a.json is None else Path(a.json)
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise ValueError(f"cannot write {target}: it is a folder, or {target.parent} is none")
    from .toy.evaluate import PARTS, evaluate_toy
    from .toy.prompt import split_prompts
    from .version import versions

    _, prompts = split_prompts()
    if a.prompts is not None and not 1 <= a.prompts <= len(prompts):
        raise ValueError(f"prompts must be in 1..{len(prompts)}, the number of held-out prompts, got {a.prompts}")
    prompts = prompts[: a.prompts]
    model = _load_model(a)
    lengths = a.num_frames or [model.train_frames, PARTS * model.train_frames]
    with _columns("videos {task.completed}/{task.total}") as bar:
        task = bar.add_task("", total=None)
        rows = evaluate_toy(
            model, prompts, seed=a.seed, num_frames=lengths, order=a.order, batch=a.batch,
            on_videos=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    _print_table(rows, f"{model.name} ({model.weights_sha256[:12]}), {len(prompts)} held-out prompts, seed {a.seed}, "
                       f"{len(model.schedule)} steps")  # fmt: skip
    if target is not None:
        about = {
            "model": model.name,
            "weights_sha256": model.weights_sha256,
            "seed": a.seed,
            "prompts": len(prompts),
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "versions": versions("torch"),
        }
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps({**about, "rows": [row.to_dict() for row in rows]}, indent=2) + "\n")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def _print_table(rows: Sequence[Any], title: str) -> None:
    """One line per row; percentages, the sixths of a video from its first to its last."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    print(title)  # not the table's: it would be wrapped to its width
    table = Table(box=box.MARKDOWN)
    for heading in ("order", "frames", "colour %", "by sixth", "valid %", "by sixth", "direction %", "speed/truth"):
        table.add_column(heading, justify="left" if heading == "order" else "right", no_wrap=True)
    for row in rows:
        whole = row.whole
        colours, valids = (
            " ".join(f"{100 * getattr(part, name):.0f}" for part in row.parts) for name in ("colour", "valid")
        )
        table.add_row(
            row.order, str(row.num_frames), f"{100 * whole.colour:.1f}", colours, f"{100 * whole.valid:.1f}", valids,
            f"{100 * whole.direction:.1f}", f"{whole.speed_ratio:.2f}",
        )  # fmt: skip
    console = Console()
    Console(width=max(console.width, 150)).print(table)


# hiar doctor


def _doctor(_: Namespace) -> None:
    from .doctor import report

    for topic, found in report():
        print(f"{topic + ':':<28} {found}")


Command = tuple[Callable[[ArgumentParser], None], Callable[[Namespace], None], str]
COMMANDS: dict[str, Command] = {
    "generate": (_generate_arguments, _generate, "Make a video of a prompt."),
    "train": (_train_arguments, _train, "Train a small model of the toy world; the same command resumes."),
    "evaluate": (_evaluate_arguments, _evaluate, "Measure how well a toy model's videos keep their prompts."),
    "verify-parity": (parity_arguments, verify_parity, "Compare a pipeline of processes with one, bit for bit."),
    "warmup": (warmup_arguments, warmup, "Compile and capture ahead for a size; say what a cold start costs."),
    "profile": (profile_arguments, profile, "Say where the time of a rollout goes, beside the machine's limits."),
    "bench-report": (report_arguments, bench_report, "Say what more GPUs gain: measured, and by the simulator."),
    "doctor": (lambda parser: None, _doctor, "Say what is installed, what would run, and what is missing."),
}
