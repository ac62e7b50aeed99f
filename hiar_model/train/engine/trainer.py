"""The training loop: turns, gradient accumulation, averages, states, what is watched. What is learnt, a stage says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.settings import own_settings
from ...io.files import check_output
from ...models.threads import cpu_threads, fitting_threads
from ...models.transformer import HiARTransformer
from ...version import NOISE, require_noise
from ..config.reading import differing_keys
from ..config.recipe import TrainingRecipe
from ..stages.base import Stage, Turn
from .distributed import Place, largest, release, shard, synchronise
from .ema import Ema
from .metrics import LOSSES, Watch, sample_scalars
from .networks import whole
from .optimizers import Optimizers, rate_factor
from .snapshots import Snapshots

STATES, MODEL = "states", "model"


class Trainer:
    """One run in one folder. The same folder goes on where its last state stands, to the bit.

    Args:
        recipe: what to train. stage: of it. folder: for states/, loss.csv and the other records, and the model.
        place: of this process. say: told what people should read, on the first rank.

    Attributes:
        update: how many are done.

    Raises:
        ValueError: the folder holds a run of another recipe, or a state that cannot be read.
    """

    @own_settings()
    def __init__(
        self,
        recipe: TrainingRecipe,
        stage: Stage,
        folder: str | Path,
        place: Place | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.recipe, self.stage, self.folder = recipe, stage, Path(folder)
        self.place = place or Place(0, 1, torch.device("cpu"))
        self.first = self.place.rank == 0
        self.say = say if self.first else lambda text: None
        if self.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_output(self.folder / LOSSES)
        self.parts = self.place.rows(recipe.batch_size, recipe.scale.micro_batch)
        recompute = recipe.scale.activation_checkpointing
        for network in stage.frozen.values():
            shard(network, self.place, recipe.precision, trained=False)
        for network in stage.trained.values():
            shard(network, self.place, recipe.precision, trained=True, activation_checkpointing=recompute)
        self.optimizers = {
            name: Optimizers(network, recipe.optimizer_of(name)) for name, network in stage.trained.items()
        }
        self.ema = Ema(stage.trained[stage.averaged], recipe.ema)
        self.update, self.ends = 0, False
        self.pending: list[dict[str, float]] = []
        self.snapshots = Snapshots(self.folder / STATES)
        self.state = self.snapshots.newest()
        if self.state is not None:
            self._load(self.state)

    @own_settings()
    def run(self, on_update: Callable[[int, Mapping[str, float]], None] | None = None) -> bool:
        """Train up to ``recipe.updates``; returns whether they are done, or the time was over or it was ended before.

        Args:
            on_update: called with the number of updates done and what was watched in the last one.

        Raises:
            FloatingPointError: a loss or gradient that is not finite: names update, turn, rows and the last state.
            OSError: a state cannot be written; the last good one is named.
        """
        recipe, begun = self.recipe, time.monotonic()
        watch = Watch(self.folder, self.update, recipe.to_dict(), self.say) if self.first else None
        networks = [*self.stage.trained.values(), *self.stage.frozen.values()]
        with ExitStack() as closing:
            closing.enter_context(cpu_threads(fitting_threads(*networks, requested=recipe.scale.threads)))
            if watch is not None:
                closing.callback(watch.close)
            while self.update < recipe.updates:
                numbers = self._update()
                done = self.update
                if recipe.sample_every and (done % recipe.sample_every == 0 or done == recipe.updates):
                    numbers |= self._sample(watch)
                self.pending.append(numbers)
                if done % recipe.log_every == 0 or done == recipe.updates:
                    self._log(watch)
                over = self._over(begun) or self.ends
                if over or done % recipe.scale.checkpoint_every == 0 or done == recipe.updates:
                    self._save()
                if on_update is not None:
                    on_update(done, numbers)
                if over:
                    break
        return self.update == recipe.updates

    def end(self) -> None:
        """Let :meth:`run` write a state and return behind the update that is being made, as from a signal handler. Of
        a run on one process: several would have to agree.
        """
        self.ends = True

    def averaged_model(self) -> HiARTransformer | None:
        """The averaged network, plain and on the CPU; None on ranks but the first. Every rank must call it."""
        return whole(self.ema.weights, self.stage.trained[self.stage.averaged].config)

    @own_settings()
    def export(self) -> Path | None:
        """Write the averaged network as the stage does; returns where, on the first rank. Every rank must call it."""
        model = self.averaged_model()
        return None if model is None else self.stage.export(model, self.folder / MODEL)

    def _update(self) -> dict[str, float]:
        """All turns of one update; returns the means of what was watched."""
        turns: dict[str, list[dict[str, float]]] = {}
        for turn in self.stage.turns(self.update):
            turns.setdefault(turn.network, []).append(self._turn(turn))
        averaged = self.stage.averaged
        if averaged in turns:
            self.ema.update(self.update)
        self.update += 1
        return {
            f"{network}_{name}": sum(one[name] for one in several) / len(several)
            for network, several in turns.items()
            for name in several[0]
        }

    def _turn(self, turn: Turn) -> dict[str, float]:
        """One optimiser step; returns what was watched, over the batch of all ranks."""
        recipe, place = self.recipe, self.place
        optimizer, network = self.optimizers[turn.network], self.stage.trained[turn.network]
        seen: list[Tensor] = []
        names: list[str] = []
        for i, rows in enumerate(self.parts):
            synchronise(network, i == len(self.parts) - 1)
            share = len(rows) / recipe.batch_size
            with self._precision():
                loss, scalars = self.stage.loss(turn, self.update, rows)
            # FSDP averages gradients over all processes.
            (loss * (share * place.ranks)).backward()
            names = ["loss", *scalars]
            values = [loss.detach().double(), *scalars.values()]
            seen.append(share * torch.stack([torch.as_tensor(v, dtype=torch.float64).to(place.device) for v in values]))
        self._release()
        means = place.total(torch.stack(seen).sum(0))
        norm = optimizer.clip()
        numbers = torch.cat([means, norm.detach().double().reshape(1)]).tolist()  # the turn's one wait for the device
        if not torch.isfinite(torch.tensor([numbers[0], numbers[-1]])).all():
            self._stop(turn, numbers[0], numbers[-1], seen)
        optimizer.step(self.update / recipe.updates)
        return dict(zip([*names, "gradient_norm"], numbers, strict=True))

    def _release(self) -> None:
        for network in self.stage.trained.values():
            release(network)

    def _precision(self) -> AbstractContextManager[object]:
        half = self.recipe.precision == "bfloat16"
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=half)

    def _stop(self, turn: Turn, loss: float, norm: float, seen: list[Tensor]) -> None:
        bad = [0.0] * self.recipe.batch_size
        for rows, numbers in zip(self.parts, seen, strict=True):
            for row in rows:
                bad[row] = float(not torch.isfinite(numbers[0]))
        rows = [row for row, wrong in enumerate(largest(bad, self.place)) if wrong]
        what = f"loss is {loss} in rows {rows} of the batch" if rows else f"gradient norm is {norm}, loss {loss}"
        good = self.state or "none"
        raise FloatingPointError(f"{what}, update {self.update}, turn {turn}; last good state: {good}")

    def _sample(self, watch: Watch | None) -> dict[str, float]:
        with self.ema.applied(), torch.no_grad(), self._precision():
            frames = self.stage.sample(self.update)
            self._release()  # what was gathered here are averages
        if frames is None or watch is None:
            return {}
        watch.sheet(self.update, frames)
        return sample_scalars(frames)

    def _log(self, watch: Watch | None) -> None:
        """Means over the updates since the last row; of numbers that are not in all of them, over those they are in."""
        if watch is not None:
            names = dict.fromkeys(name for numbers in self.pending for name in numbers)
            columns = {name: [numbers[name] for numbers in self.pending if name in numbers] for name in names}
            rule = self.recipe.optimizer
            rate = rate_factor((self.update - 1) / self.recipe.updates, rule.warmup, rule.cooldown)
            means = {name: sum(values) / len(values) for name, values in columns.items()}
            watch.scalars(self.update, {**means, "rate": rate})
        self.pending.clear()

    def _over(self, begun: float) -> bool:
        limit = self.recipe.scale.max_minutes
        if limit is None:
            return False
        return bool(largest([float(time.monotonic() - begun > 60 * limit)], self.place)[0])

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by name, in place."""
        found = {f"average/{name}": value for name, value in self.ema.weights.items()}
        for network, module in self.stage.trained.items():
            found |= {f"{network}/{name}": p.detach() for name, p in module.named_parameters()}
            states = self.optimizers[network].state().items()
            found |= {f"{network}.optimizer/{name}": value for name, value in states}
        return found

    def _save(self) -> None:
        about: dict[str, Any] = {
            "recipe": self.recipe.to_dict(),
            "noise": NOISE,
            "update": self.update,
            "pending": self.pending,
            "ranks": self.place.ranks,
        }
        self.state = self.snapshots.save(self.update, self._tensors(), about)

    def _load(self, state: Path) -> None:
        about = self.snapshots.about(state)
        differ = differing_keys(self.recipe.to_dict(), about["recipe"])
        if differ:
            raise ValueError(
                f"{self.folder} holds a run with another {', '.join(differ)}; choose another --out or delete the folder"
            )
        require_noise(str(state), about.get("noise"))
        self.snapshots.load(state, self._tensors())
        self.update, self.pending = about["update"], about["pending"]
