"""The training loop: update steps, gradient accumulation, weight averages, saved states, metrics; the losses are the
stage's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...common.settings import own_settings
from ...io.files import check_folder, check_output, lock
from ...models.threads import cpu_threads, fitting_threads
from ...models.transformer import HiARTransformer
from ...version import NOISE, require_noise
from ..config.recipe import TrainingRecipe
from ..data.shards import SETTINGS
from ..stages.base import Stage, UpdateStep
from .distributed import DistContext, from_first, reshard, set_requires_gradient_sync, shard
from .ema import Ema
from .loss_plot import PICTURE
from .metrics import EVENTS, LOSSES, SAMPLES, MetricsLogger, sample_scalars
from .networks import gather
from .optimizers import Optimizers
from .resume import INITIAL, MODEL, MODELS, STATES, check_resume, departures, execution, same_inputs, weights_hash
from .snapshots import Snapshots


def check_kind_of_folder(folder: Path, *, trains: bool) -> None:
    """ValueError of one line if the folder holds the output of the other kind of stage: a run, or shards of data."""
    if trains and (folder / SETTINGS).exists():
        raise ValueError(f"{folder} holds shards of prompts or trajectories; choose another --out for a run")
    if not trains and any((folder / name).exists() for name in (STATES, LOSSES)):
        raise ValueError(f"{folder} holds a run; choose another --out for shards of prompts or trajectories")


def check_run_folder(folder: Path) -> None:
    """ValueError of one line if something of a run cannot be written there; call it before any work starts."""
    check_kind_of_folder(folder, trains=True)
    check_folder(folder)
    for name in (STATES, MODEL, MODELS, SAMPLES, EVENTS):
        check_folder(folder / name)
    for name in (LOSSES, PICTURE) if folder.is_dir() else ():
        check_output(folder / name)


@contextmanager
def run_folder_held(folder: Path, work: str = "trains") -> Iterator[None]:
    """Makes the folder for the block; what it leaves empty is removed. ``work``: what is done there, for the message.

    Raises:
        ValueError: another process works there, whose files would mix with those of this one.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        handle = lock(folder)
    except BlockingIOError:
        raise ValueError(f"another process {work} in {folder}: wait for it, or choose another --out") from None
    try:
        with handle:
            yield
    finally:
        with suppress(OSError):
            for path in new_folders:
                path.rmdir()


class Trainer:
    """One run in one folder; the same folder resumes from its last state, bit for bit.

    Args:
        recipe: what to train. stage: of it. folder: for states/, loss.csv and the other records, and the model.
        dist_context: of this process; None: alone, on the CPU. say: called with lines for the user, on rank 0.

    Attributes:
        update: number of finished updates.
        stopped: whether :meth:`stop`, in any of the processes, ended :meth:`run`; the same in all of them.

    Raises:
        ValueError: the folder holds a run of another recipe, a state that cannot be read, or models without a state;
            a file that the recipe names has another content than when the run began.
    """

    @own_settings()
    def __init__(
        self,
        recipe: TrainingRecipe,
        stage: Stage,
        folder: str | Path,
        dist_context: DistContext | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.recipe, self.stage, self.folder = recipe, stage, Path(folder)
        self.dist_context = dist_context or DistContext(0, 1, torch.device("cpu"))
        self.first = self.dist_context.rank == 0
        self.say = say if self.first else lambda line: None
        if self.first:
            check_run_folder(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        check_resume(recipe, self.folder)
        self.micro_batches = self.dist_context.micro_batches(recipe.batch_size, recipe.scale.micro_batch)
        recompute = recipe.scale.activation_checkpointing
        for network in stage.frozen.values():
            shard(network, self.dist_context, recipe.precision, trained=False)
        for network in stage.trained.values():
            shard(network, self.dist_context, recipe.precision, trained=True, activation_checkpointing=recompute)
        self.optimizers = {
            name: Optimizers(network, recipe.optimizer_of(name)) for name, network in stage.trained.items()
        }
        self.ema = Ema(stage.trained[stage.averaged], recipe.ema)
        self.update, self.stopping, self.stopped = 0, False, False
        self._deadline = math.inf
        self._execution_before: Mapping[str, Any] = {}
        self._agreed = [False, False]  # :meth:`_ends` of any process, when the last optimiser step was made
        self.pending: list[dict[str, float]] = []
        self.snapshots = Snapshots(self.folder / STATES)
        self.inputs, self.execution = self._inputs()
        self.state = self._newest()
        if self.state is None:
            self.inputs |= self._initial_weights()
        else:
            self._load(self.state)

    @own_settings(gradients=True)
    def run(self, on_update: Callable[[int, Mapping[str, float]], None] | None = None) -> bool:
        """Train up to ``recipe.updates``; returns whether it got there: False after :meth:`stop` or ``max_minutes``.

        Args:
            on_update: called with the number of updates done and the metrics of the last one.

        Raises:
            FloatingPointError: a loss or gradient that is not finite, with update, step, samples and last good state.
            OSError: a state cannot be written; the last good one is named.
        """
        recipe = self.recipe
        if recipe.scale.max_minutes is not None:
            self._deadline = time.monotonic() + 60 * recipe.scale.max_minutes
        logger = None
        if self.first:
            logged = self.update - len(self.pending)
            logger = MetricsLogger(self.folder, self.update, recipe.to_dict(), self.say, logged)
        networks = [*self.stage.trained.values(), *self.stage.frozen.values()]
        with ExitStack() as closing:
            closing.enter_context(cpu_threads(fitting_threads(*networks, requested=recipe.scale.threads)))
            self._say_departures()
            if logger is not None:
                closing.callback(logger.close)
            while self.update < recipe.updates:
                metrics = self._update()
                done = self.update
                if recipe.sample_every and (done % recipe.sample_every == 0 or done == recipe.updates):
                    metrics |= self._sample(logger)
                self.pending.append(metrics)
                if done % recipe.log_every == 0 or done == recipe.updates:
                    self._log(logger)
                # One process looks again: samples take their time.
                self.stopped, time_is_over = self._ends() if self.dist_context.world_size == 1 else self._agreed
                last = self.stopped or time_is_over or done == recipe.updates
                # Before the state, behind which a run goes on: what is killed in between comes again.
                if recipe.scale.model_every and done % recipe.scale.model_every == 0 and done < recipe.updates:
                    self._export(self.folder / MODELS / f"update_{done:08d}")
                if last or done % recipe.scale.checkpoint_every == 0:
                    if logger is not None:
                        logger.sync()
                    self._save()
                if on_update is not None:
                    on_update(done, metrics)
                if last:
                    break
        return self.update == recipe.updates

    def stop(self) -> None:
        """Make :meth:`run` save a state and return after the current update; may be called from a signal handler. Of
        several processes one call is enough: all see it in their next optimiser step and return after its update.
        """
        self.stopping = True

    def averaged_model(self) -> HiARTransformer | None:
        """The averaged network, plain and on the CPU; None on ranks other than 0. Every rank must call it."""
        return gather(self.ema.weights, self.stage.trained[self.stage.averaged].config)

    @own_settings()
    def export(self) -> Path | None:
        """Write the averaged network as the stage does; returns the path, on rank 0. Every rank must call it."""
        return self._export(self.folder / MODEL)

    def _export(self, folder: Path) -> Path | None:
        model = self.averaged_model()
        return None if model is None else self.stage.export(model, folder)

    def _update(self) -> dict[str, float]:
        """All optimiser steps of one update; returns the means of their metrics."""
        metrics: dict[str, list[dict[str, float]]] = {}
        for step in self.stage.update_steps(self.update):
            metrics.setdefault(step.network, []).append(self._step(step))
        averaged = self.stage.averaged
        if averaged in metrics:
            self.ema.update(self.update)
        self.update += 1
        return {
            f"{network}_{name}": sum(one[name] for one in several) / len(several)
            for network, several in metrics.items()
            for name in several[0]
        }

    def _step(self, step: UpdateStep) -> dict[str, float]:
        """One optimiser step; returns its metrics, over the batch of all ranks."""
        recipe, dist_context = self.recipe, self.dist_context
        optimizer, network = self.optimizers[step.network], self.stage.trained[step.network]
        parts: list[Tensor] = []
        names: list[str] = []
        for i, samples in enumerate(self.micro_batches):
            set_requires_gradient_sync(network, i == len(self.micro_batches) - 1)
            share = len(samples) / recipe.batch_size
            with self._located(f"update {self.update}, step {step}"), self._precision():
                loss, scalars = self.stage.loss(step, self.update, samples)
            # FSDP averages gradients over all processes.
            (loss * (share * dist_context.world_size)).backward()
            names = ["loss", *scalars]
            values = [loss.detach().double(), *scalars.values()]
            tensors = [torch.as_tensor(v, dtype=torch.float64).to(dist_context.device) for v in values]
            parts.append(share * torch.stack(tensors))
        self._reshard()
        ends = torch.tensor(self._ends(), dtype=torch.float64, device=dist_context.device)
        sums = dist_context.all_reduce_sum(torch.cat([ends, torch.stack(parts).sum(0)]))
        norm = optimizer.clip().detach().double().reshape(1)
        stopped, time_is_over, *numbers = torch.cat([sums, norm]).tolist()  # the step's one wait for the device
        self._agreed = [stopped > 0, time_is_over > 0]
        if not all(map(math.isfinite, numbers)):
            self._raise_not_finite(step, dict(zip([*names, "gradient_norm"], numbers, strict=True)), names, parts)
        optimizer.step(self.update / recipe.updates)
        return dict(zip([*names, "gradient_norm"], numbers, strict=True))

    def _reshard(self) -> None:
        for network in self.stage.trained.values():
            reshard(network)

    def _precision(self) -> AbstractContextManager[object]:
        half = self.recipe.precision == "bfloat16"
        torch.clear_autocast_cache()  # in a block of the caller's torch would keep the weights of the first forward
        return torch.autocast(self.dist_context.device.type, torch.bfloat16, enabled=half)

    def _raise_not_finite(
        self, step: UpdateStep, metrics: Mapping[str, float], names: Sequence[str], parts: Sequence[Tensor]
    ) -> NoReturn:
        """FloatingPointError that names the metric, the samples it comes from, and the last good state."""
        # The loss last: it is not finite where another metric, which says more, is not.
        name = next(n for n in (*names[1:], "loss", "gradient_norm") if not math.isfinite(metrics[n]))
        bad = [0.0] * self.recipe.batch_size
        if name in names:
            for samples, values in zip(self.micro_batches, parts, strict=True):
                for sample in samples:
                    bad[sample] = float(not math.isfinite(values[names.index(name)]))
        where = [sample for sample, is_bad in enumerate(self.dist_context.all_reduce_max(bad)) if is_bad]
        what = f"{name.replace('_', ' ')} is {metrics[name]}"
        what += f" in samples {where} of the batch" if where else f", loss {metrics['loss']}"
        raise FloatingPointError(f"{what}, update {self.update}, step {step}; last good state: {self.state or 'none'}")

    @contextmanager
    def _located(self, where: str) -> Iterator[None]:
        """A rollout that is not finite says where in its video; add where in the run, and the last good state."""
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(f"{where}: {error}; last good state: {self.state or 'none'}") from error

    def _sample(self, logger: MetricsLogger | None) -> dict[str, float]:
        where = f"samples after update {self.update}"
        with self._located(where), self.ema.applied(), torch.no_grad(), self._precision():
            frames = self.stage.sample(self.update)
            self._reshard()  # what is unsharded here are averages
        if frames is None:
            return {}
        if logger is not None:
            logger.sheet(self.update, frames)
        return sample_scalars(frames)

    def _log(self, logger: MetricsLogger | None) -> None:
        """Means over the updates since the last row; a metric that not all of them have, over those that have it. The
        learning rates are those of the last update.
        """
        if logger is not None:
            names = dict.fromkeys(name for metrics in self.pending for name in metrics)
            columns = {name: [metrics[name] for metrics in self.pending if name in metrics] for name in names}
            means = {name: sum(values) / len(values) for name, values in columns.items()}
            progress = (self.update - 1) / self.recipe.updates
            rates = {f"{name}_learning_rate": each.rate(progress) for name, each in self.optimizers.items()}
            logger.scalars(self.update, {**means, **rates})
        self.pending.clear()

    def _ends(self) -> list[bool]:
        """Why this process would end the run after this update: it was asked to stop, its time is over."""
        return [self.stopping, time.monotonic() > self._deadline]

    def _state_dict(self) -> dict[str, Any]:
        """Weights, optimiser states and averages, for torch.distributed.checkpoint to save or load in place."""
        state: dict[str, Any] = {"average": self.ema.weights}
        for name, network in self.stage.trained.items():
            weights = {key: p.detach() for key, p in network.named_parameters()}
            state[name] = {"weights": weights, "optimizer": self.optimizers[name].state_dict()}
        return state

    def _save(self) -> None:
        about: dict[str, Any] = {
            "recipe": self.recipe.to_dict(),
            "noise": NOISE,
            "update": self.update,
            "pending": self.pending,
            "ranks": self.dist_context.world_size,
            "inputs": self.inputs,
            "execution": self.execution,
        }
        self.state = self.snapshots.save(self.update, self._state_dict(), about)

    def _load(self, path: Path) -> None:
        about = self.snapshots.about(path)
        self.inputs = same_inputs(self.recipe, self.folder, path, about, self.inputs, self._initial_weights)
        require_noise(str(path), about.get("noise"))
        state = self._state_dict()
        self.snapshots.load(path, state)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name]["optimizer"])
        self.update, self.pending = about["update"], about["pending"]
        self._execution_before = about.get("execution", {})

    def _newest(self) -> Path | None:
        """The state to go on from; ValueError where the processes do not see the same one."""
        state = self.snapshots.newest()
        names = self.dist_context.gather(state.name if state else "no state")
        other = next((rank for rank, name in enumerate(names) if name != names[0]), 0)
        if other:
            seen = f"rank 0 sees {names[0]}, rank {other} {names[other]}"
            raise ValueError(f"{self.snapshots.folder}: {seen}; all processes must share its file system")
        return state

    def _inputs(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Hashes of what is read in every update, and descriptions of what may be made again."""
        content, shards = from_first(self.stage.inputs)
        frozen = {name: weights_hash(network) for name, network in self.stage.frozen.items()}
        return {**frozen, **content}, dict(shards)

    def _initial_weights(self) -> dict[str, str]:
        """Hashes of the networks as they are before a state is loaded, by key of the recipe."""
        names = dict(zip(("student", "critic", "teacher"), (*INITIAL, INITIAL[0]), strict=True))
        return {names[name]: weights_hash(network) for name, network in self.stage.trained.items()}

    def _say_departures(self) -> None:
        self.execution |= execution(self.dist_context, self.recipe)
        line = departures(self._execution_before, self.execution)
        if line and self.update < self.recipe.updates:
            self.say(line)
        self._execution_before = self.execution
