"""The command `hiar`. Commands import what they need when they run, so `hiar --help` does not import torch."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ..common import environment
from ..common.checks import out_of_memory
from ..io.files import as_name, as_text
from ..version import package_version
from .choices import SHARED, as_typed, check_choices, check_effects, check_processes, explained, options_of
from .compare import compare, compare_arguments
from .config_file import ConfigFile, config_first, refuse_times
from .evaluate import evaluate, evaluate_arguments
from .generate import generate, generate_arguments
from .parallel import AGAIN, launch, parity_arguments, verify_parity
from .performance import bench, bench_arguments, warmup, warmup_arguments
from .serve import serve, serve_arguments
from .signals import as_interrupts, interrupted
from .streams import kept_streams, status
from .train import RESUMES, train, train_arguments
from .weights import convert, convert_arguments, doctor, doctor_arguments

CONFIG_HELP = "file with options of this command: YAML, or the .json beside a video; options typed here take precedence"
FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130


def build_parser(command: str | None = None) -> ArgumentParser:
    """The parser, which refuses unknown options and keys: with the options of one command, or (None) of all."""
    parser = ArgumentParser(
        prog="hiar",
        description="Long video by hierarchical denoising.",
        version=package_version(),
        exit_on_error=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, (add_arguments, _, summary) in COMMANDS.items():
        subparser = ArgumentParser(description=summary, exit_on_error=False)
        if command in (None, name):
            subparser.add_argument("--config", action=ConfigFile, metavar="FILE", help=CONFIG_HELP)
            add_arguments(subparser)
        commands.add_subcommand(name, subparser, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``argv`` None: the process's) and return the exit code: 0; 2 for illegal input; 1 for a
    result that is not finite or black, or where standard output cannot be written; 130 for Ctrl-C, SIGTERM or SIGHUP;
    141 where the reader of standard output is gone. An error is one line on stderr.
    """
    with kept_streams():
        try:
            return status(_run(config_first(sys.argv[1:] if argv is None else argv)))
        except SystemExit as done:  # of --help
            if code := status(int(done.code or 0)):
                return code
            raise


def _run(words: list[str]) -> int:
    debug = False
    dests: dict[str, Any] = {}
    parser = build_parser(next((word for word in words if not word.startswith("-")), ""))
    if not words:
        parser.print_help()
        return 0
    try:
        arguments = parser.parse_args(words)
        debug = arguments.debug
        chosen = arguments[arguments.subcommand]
        dests = options_of(parser, arguments.subcommand)
        refuse_times(words, chosen)
        for name, value in vars(chosen).items():
            if isinstance(value, str):
                chosen[name] = as_text(value) if name == "prompt" else as_name(value)
            elif name in ("lora", "image") and isinstance(value, list):
                chosen[name] = [as_name(file) if isinstance(file, str) else file for file in value]
        check_choices(arguments.subcommand, chosen)
        check_effects(arguments.subcommand, chosen, dests)
        check_processes(arguments.subcommand)
        if arguments.subcommand in SHARED:
            chosen.debug = debug  # an error of one of several processes is not printed here
        if chosen.get("nproc", 1) > 1 and not environment.under_torchrun():
            out = chosen.get("out") if arguments.subcommand == "generate" else None
            return launch(words, chosen.nproc, out, RESUMES if arguments.subcommand == "train" else AGAIN)
        with _interruptible():
            COMMANDS[arguments.subcommand][1](chosen)
        return 0
    except KeyboardInterrupt as error:
        return _fail(interrupted(error), INTERRUPTED, debug)
    except FloatingPointError as error:
        return _fail(error, FAILED, debug)
    except (MemoryError, RuntimeError) as error:
        if (missing := out_of_memory(error)) is None:
            raise
        return _fail(missing, WRONG_INPUT, debug)
    except ArgumentError as error:
        return _fail(explained(str(error), parser, words), WRONG_INPUT, debug)
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            message = f"{os.fsdecode(error.filename)}: {error.strerror}"  # and no number
        return _fail(as_typed(message, dests), WRONG_INPUT, debug)


def _interruptible() -> AbstractContextManager[None]:
    """A single process treats SIGTERM as Ctrl-C; in a job of several, the watchdog does."""
    alone = environment.world_size() == 1 and threading.current_thread() is threading.main_thread()
    return as_interrupts() if alone else nullcontext()


def _fail(message: object, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("hiar:", " ".join(str(message).split()), file=sys.stderr)
    return code


Command = tuple[Callable[[ArgumentParser], None], Callable[[Namespace], None], str]
COMMANDS: dict[str, Command] = {
    "generate": (generate_arguments, generate, "Make a video of a prompt."),
    "compare": (
        compare_arguments,
        compare,
        "Make a prompt's video in several orders, side by side, and plot the drift.",
    ),
    "serve": (serve_arguments, serve, "Serve live video to browsers and programs, and make whole videos as jobs."),
    "train": (train_arguments, train, "Train by a recipe, here or under torchrun; the same command resumes."),
    "evaluate": (evaluate_arguments, evaluate, "Measure how well a toy model's videos keep their prompts."),
    "verify-parity": (parity_arguments, verify_parity, "Compare a pipeline of processes with one, bit for bit."),
    "bench": (bench_arguments, bench, "Measure how fast a rollout is, beside plain PyTorch, and say what is included."),
    "warmup": (warmup_arguments, warmup, "Compile and capture ahead for a size; say what a cold start costs."),
    "convert": (convert_arguments, convert, "Write weights in another layout, and prove that nothing changed."),
    "doctor": (doctor_arguments, doctor, "Say what is installed and would run; with --model, what memory it takes."),
}
