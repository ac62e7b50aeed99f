"""The interface between the trainer and a stage of training, and the table of stages.

Random numbers of a stage depend neither on the rank nor on what ran before: they are keyed by (seed, stage, update,
step, sample), see :mod:`hiar_model.common.keyed`. So a resumed run and any number of processes draw the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ...common.settings import own_settings
from ...io.video import Frames
from ...models.transformer import HiARTransformer
from ..config.reading import shipped_recipes

Scalars = Mapping[str, float | Tensor]
"""Metrics by name: numbers, or tensors of one element, which the trainer reads with the loss."""


class UpdateStep(NamedTuple):
    """One optimiser step of one network: the ``index``-th of its steps in this update. ``name``: for messages, and part
    of the key of the step's noise.
    """

    network: str
    index: int = 0  # type: ignore[assignment]  # hides tuple.index
    name: str = ""

    def __str__(self) -> str:
        return self.name or f"{self.network} {self.index}"


class Inputs(NamedTuple):
    """Hashes of what a stage reads while it trains beside its networks, by the key of the recipe that names it.

    content   a run of another content is another run
    shards    descriptions of files that may be made again, with other roundings
    """

    content: Mapping[str, str] = {}
    shards: Mapping[str, str] = {}


class Stage(Protocol):
    """A stage that trains networks.

    trained   networks by name; each has an optimiser of its own
    frozen    networks that are only evaluated
    averaged  name of the trained network whose running average is kept, sampled and exported
    """

    trained: dict[str, HiARTransformer]
    frozen: dict[str, HiARTransformer]
    averaged: ClassVar[str]

    def inputs(self) -> Inputs:
        """What it reads; called by rank 0 alone."""

    def update_steps(self, update: int) -> Sequence[UpdateStep]:
        """The optimiser steps of one update, in order; the same for all processes."""

    def loss(self, step: UpdateStep, update: int, samples: Sequence[int]) -> tuple[Tensor, Scalars]:
        """Mean loss over some ``samples`` of the step's batch, and means of metrics over them.

        Samples must be independent: the trainer averages over any partition of the batch.
        """

    def sample(self, update: int) -> Frames | None:
        """Videos uint8 [N, F, H, W, 3] of the averaged network; during this call it has the averaged weights."""

    def export(self, model: HiARTransformer, folder: Path) -> Path:
        """Write the averaged network, plain and on the CPU, as a model that can be loaded; returns the path."""


class Production(Protocol):
    """A stage that trains nothing: it writes files that a later stage reads."""

    def produce(self, folder: Path, rank: int, ranks: int, on_progress: Callable[[int, int], None]) -> str:
        """Write this process's share, resuming an earlier call; returns a line for the user.

        ``on_progress`` is called with (samples done, samples in all) of this process.
        """


STAGES = {
    "prompts": ("data.prompts", "EncodedPrompts"),
    "teacher_forcing": ("stages.teacher_forcing", "TeacherForcing"),
    "teacher": ("stages.distillation", "Teacher"),
    "ode_pairs": ("stages.distillation", "OdePairs"),
    "ode_init": ("stages.distillation", "OdeInit"),
    "hiar": ("stages.distillation", "HiAR"),
}
"""Name in a recipe -> (module of hiar_model.train, class); the class takes (recipe, device)."""


def check_inputs(recipe: Any) -> None:
    """ValueError if the output of an earlier stage is missing: names the command that makes it."""
    kl = getattr(recipe, "forward_kl", None)
    inputs = {key: getattr(recipe, key, None) for key in ("init", "teacher", "trajectories")}
    inputs["forward_kl.trajectories"] = getattr(kl, "trajectories", None)
    inputs["data.folder"] = getattr(getattr(recipe, "data", None), "folder", None)
    for key, path in inputs.items():
        stage = next((s for s in shipped_recipes() if f"{path}/".startswith(f"runs/{s}/")), None)
        if stage is not None and not Path(str(path)).exists():
            raise ValueError(f"{key} {path}: no such file or folder; hiar train {stage} makes it")


@own_settings()
def make_stage(recipe: Any, device: torch.device) -> Any:
    """The :class:`Stage` or :class:`Production` of a recipe, its networks on ``device``."""
    check_inputs(recipe)
    module, name = STAGES[recipe.stage]
    return getattr(import_module(f"hiar_model.train.{module}"), name)(recipe, device)
