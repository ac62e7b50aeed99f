"""`hiar train`: runs a recipe, on one process or under torchrun."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from ..common import environment
from ..common.checks import out_of_memory
from .machine import progress_bar
from .parallel import FAILED, INTERRUPTED, WRONG_INPUT
from .signals import AHEAD, ENDING, handled, interrupted
from .streams import status

if TYPE_CHECKING:
    from ..distributed.peers import Peers
    from ..train.config.recipe import Recipe, TrainingRecipe
    from ..train.engine.distributed import DistContext
    from ..train.engine.trainer import Trainer


ONE_SIGNAL = 2.0
"""Seconds in which signals count as one: schedulers send it to all processes, of which launchers pass it on."""

RESUMES = "the same command resumes from the last state"
LESS_MEMORY = "scale.micro_batch=1, scale.activation_checkpointing=true and more processes (scale.shard) need less"


class _Stopped(KeyboardInterrupt):
    """All processes stopped after the same update."""


def train_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", type=str, help="name of a shipped recipe (such as toy/hiar), or a .yaml file")
    parser.add_argument(
        "overrides",
        type=str,
        nargs="*",
        default=[],
        metavar="key=value",
        help="before options; such as optimizer.lr=1e-3",
    )
    parser.add_argument("--out", type=str, help="folder of the run, which resumes; default: runs/RECIPE")
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is any), cpu, cuda")
    parser.add_argument("--nproc", type=int, default=1, help="processes to start here, as torchrun does")


def train(a: Namespace) -> None:
    from ..io.files import check_folder
    from ..train.config.reading import load_recipe, shipped_recipes
    from ..train.config.recipe import TrainingRecipe
    from ..train.engine.distributed import init_training, launched_context
    from ..train.engine.trainer import check_kind_of_folder, check_run_folder, run_folder_held

    own = Path("runs", a.recipe if a.recipe in shipped_recipes() else Path(a.recipe).stem)
    folder = own if a.out is None else Path(a.out)
    with _among_others(a.get("debug")) as others, ExitStack() as closing:
        recipe = load_recipe(a.recipe, dict(_override(argument) for argument in a.overrides))
        trains = isinstance(recipe, TrainingRecipe)
        check_kind_of_folder(folder, trains=trains)
        if environment.rank() == 0:  # before weights are read
            (check_run_folder if trains else check_folder)(folder)
            closing.enter_context(run_folder_held(folder, "trains" if trains else "works"))
        context = init_training(recipe.scale, a.device) if trains else launched_context(a.device)
        others.join()
        if a.nproc not in (1, context.world_size):
            raise ValueError(f"nproc is {a.nproc}, but torchrun started {context.world_size} processes: give one")
        with _memory_errors():
            if isinstance(recipe, TrainingRecipe):
                _run(recipe, folder, context, others)
            else:
                _produce(recipe, folder, context)


def _run(recipe: TrainingRecipe, folder: Path, context: DistContext, others: _Others) -> None:
    from ..train.engine.loss_plot import PICTURE
    from ..train.engine.memory import require_memory_to_train
    from ..train.engine.metrics import LOSSES
    from ..train.engine.resume import check_resume, without_lost_weights
    from ..train.engine.trainer import Trainer
    from ..train.stages.base import check_inputs, make_stage

    check_resume(recipe, folder)
    context.micro_batches(recipe.batch_size, recipe.scale.micro_batch)  # refused before anything is loaded
    needed = without_lost_weights(recipe, folder)
    check_inputs(needed)
    memory = require_memory_to_train(recipe, context) / 1e9
    trainer = Trainer(recipe, make_stage(needed, context.device), folder, context)
    say, first, begun = trainer.say, trainer.update, time.perf_counter()
    others.trainer = trainer
    if first < recipe.updates:
        updates = "1 update" if recipe.updates == 1 else f"{recipe.updates} updates"
        say(f"memory: {memory:.2f} GB per process for weights and optimisers, activations on top")
        every = "every update" if recipe.log_every == 1 else f"every {recipe.log_every} updates"
        say(f"{updates}, batches of {recipe.batch_size}; losses of {every}: {folder / LOSSES}")
    if first:
        say(f"resuming from update {first} of {trainer.state}")
    means: dict[str, float] = {}
    with _bar(context, "{task.completed}/{task.total}", "{task.fields[losses]}") as bar:
        task = bar.add_task("", total=recipe.updates, completed=first, losses="")

        def show(update: int, numbers: Mapping[str, float]) -> None:
            seen = update - first
            for name in (name for name in numbers if name.endswith("_loss")):
                mean = means.get(name, numbers[name])
                means[name] = mean + (numbers[name] - mean) / min(seen, 100)
            losses = ", ".join(f"{name.replace('_', ' ')} {mean:.4f}" for name, mean in means.items())
            rate = seen / (time.perf_counter() - begun)
            speed = f"{rate:.2f} updates/s" if rate >= 0.1 else f"{1 / rate:.0f} s an update"
            bar.update(task, completed=update, losses=f"{losses}, {speed}")

        try:
            with ends_training(trainer, others.dead):
                done = trainer.run(show)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"the same command resumes from {trainer.state or 'the start'}") from error
    if trainer.stopped and not done:
        count = f"{trainer.update} of {recipe.updates} updates"
        raise _Stopped(f"after {count}; the same command resumes from {trainer.state}")
    if not done:
        say(f"max_minutes reached after {trainer.update} of {recipe.updates} updates; the same command resumes")
        return
    model = trainer.export()
    if model is None:
        return
    if (folder / PICTURE).exists():
        say(f"loss plot: {folder / PICTURE}")
    say(f"model: {model}")
    if model.is_dir():
        say(f'try: hiar generate "a red circle moving right" -o out.mp4 --model {model}')


@contextmanager
def ends_training(trainer: Trainer, dead: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """The first Ctrl-C (or the end of a terminal or a job) saves a state and stops after the current update; a second
    one stops at once. A warning ahead of time only saves and stops. dead: a process without which none can be saved.
    """
    first = math.inf

    def stop() -> None:
        if trainer.first and not trainer.stopping and dead() is None:
            line = "stopping after this update, with a saved state; Ctrl-C again: at once"
            print(line, file=sys.stderr, flush=True)
        trainer.stop()

    def interrupt() -> None:
        nonlocal first
        stop()
        first = min(first, time.monotonic())
        if time.monotonic() > first + ONE_SIGNAL:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handled(interrupt, (signal.SIGINT, *ENDING)), handled(stop, AHEAD):
        yield


def _produce(recipe: Recipe, folder: Path, context: DistContext) -> None:
    from ..train.stages.base import make_stage

    if recipe.scale.threads:
        import torch

        torch.set_num_threads(recipe.scale.threads)
    stage = make_stage(recipe, context.device)
    with _bar(context, "{task.completed}/{task.total}") as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        try:
            report = stage.produce(folder, context.rank, context.world_size, show)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"the same command goes on with the shards in {folder}") from error
    if context.rank == 0:
        print(report)


def _bar(context: DistContext, *columns: str) -> Any:
    bar = progress_bar(*columns)
    bar.disable = bar.disable or context.rank != 0
    return bar


class _Others:
    """The other processes of a run. trainer: of this one, once it is there."""

    def __init__(self) -> None:
        self.peers: Peers | None = None
        self.trainer: Trainer | None = None

    def join(self) -> None:
        """Learn where they run, if they communicate."""
        import torch.distributed as dist

        from ..distributed.peers import Peers

        if dist.is_initialized():
            self.peers = Peers()

    def dead(self, patience: float = 0.0) -> int | None:
        """The first that has died; None: none has, or nobody knows."""
        return None if self.peers is None else self.peers.dead(patience)

    def loss(self, error: BaseException) -> str | None:
        """What to say of an error that the end of another process has caused; None: it has another cause."""
        from ..distributed.peers import PATIENCE, link_error

        if self.peers is None or (line := link_error(error)) is None:
            return None
        dead, at = self.dead(PATIENCE), "" if self.trainer is None else f" in update {self.trainer.update + 1}"
        what = f"lost the others{at}: {line}" if dead is None else f"rank {dead} died{at}"
        advice = RESUMES
        if self.trainer is not None:
            advice = f"the same command resumes from {self.trainer.state or 'the start'}"
        return f"{what}; {advice}"


@contextmanager
def _among_others(debug: bool | None = False) -> Iterator[_Others]:
    """With several processes: print an error of one of them, or the same one of all, once."""
    others = _Others()
    if environment.world_size() == 1:
        yield others
        return
    code = 0
    try:
        yield others
        _await_others()
    except KeyboardInterrupt as error:
        code = INTERRUPTED
        if environment.rank() == 0:
            _print_error(interrupted(error))
        if isinstance(error, _Stopped):
            _await_others()  # the launcher ends the others when one is gone
    except Exception as error:
        code = WRONG_INPUT if isinstance(error, ValueError | OSError) else FAILED
        if (line := others.loss(error)) is not None:
            code = FAILED
            _print_error(line)
        elif isinstance(error, ValueError | OSError | FloatingPointError):
            _report(error)
        else:
            raise
        if debug:
            traceback.print_exc()
    if others.peers is not None:
        others.peers.leave()
    code = status(code)
    sys.stderr.flush()
    os._exit(code)  # a normal exit may abort while torch tears down its process groups


def _await_others() -> None:
    """No process exits while another still communicates."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def _report(error: Exception) -> None:
    _print_error(str(error), "" if environment.error_file() else f"rank {environment.rank()}: ")


def _print_error(message: str, prefix: str = "") -> None:
    """Unless a process of the same launcher of ours has printed one."""
    if environment.claim_error_report():
        print(f"hiar: {prefix}{' '.join(message.split())}", file=sys.stderr, flush=True)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Missing memory is an error of one line, which names the keys that need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (line := out_of_memory(error, LESS_MEMORY)) is None:
            raise
        raise ValueError(f"training is {line}") from error


def _override(argument: str) -> tuple[str, Any]:
    key, sign, value = argument.partition("=")
    if not key or not sign:
        raise ValueError(f"{argument!r} is not an override: write key=value, such as updates=100")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value  # a word
