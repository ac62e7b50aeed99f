"""What the trainer asks of a stage of training, and which stages there are.

Nothing a stage draws may depend on a rank or on what ran before: everything is keyed by (seed, stage, update, turn,
row), see :mod:`hiar_model.common.keyed`. So a resumed run and any number of processes see the same numbers.
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
"""What people watch, by name: numbers, or tensors of one element that need not be waited for."""


class Turn(NamedTuple):
    """One optimiser step of one network: the ``index``-th of its steps in this update. ``name``: for messages."""

    network: str
    index: int = 0  # type: ignore[assignment]  # hides tuple.index
    name: str = ""

    def __str__(self) -> str:
        return self.name or f"{self.network} {self.index}"


class Stage(Protocol):
    """A stage that trains networks.

    trained   networks by name; each has an optimiser of its own
    frozen    networks that are only asked
    averaged  name of the trained network whose running average is kept, sampled and exported
    """

    trained: dict[str, HiARTransformer]
    frozen: dict[str, HiARTransformer]
    averaged: ClassVar[str]

    def turns(self, update: int) -> Sequence[Turn]:
        """The optimiser steps of one update, in order; the same for all processes."""

    def loss(self, turn: Turn, update: int, rows: Sequence[int]) -> tuple[Tensor, Scalars]:
        """Mean over ``rows`` of the batch of this turn, and means over them to watch.

        Rows must not know of each other: the mean over all rows is put together from any parts.
        """

    def sample(self, update: int) -> Frames | None:
        """Videos uint8 [N, F, H, W, 3] of the averaged network, whose weights are in its place during this call."""

    def export(self, model: HiARTransformer, folder: Path) -> Path:
        """Write the averaged network, whole and on the CPU, as a model that can be loaded; returns where."""


class Production(Protocol):
    """A stage that trains nothing, but makes files that a later stage reads."""

    def produce(self, folder: Path, rank: int, ranks: int, on_progress: Callable[[int, int], None]) -> str:
        """Make this process's share and go on where an earlier call ended; returns what to say at the end.

        ``on_progress`` is called with (done, in all) of this process.
        """


STAGES = {
    "prompts": ("data.prompts", "EncodedPrompts"),
    "teacher_forcing": ("stages.teacher_forcing", "TeacherForcing"),
    "teacher": ("stages.distillation", "Teacher"),
    "ode_pairs": ("stages.distillation", "OdePairs"),
    "ode_init": ("stages.distillation", "OdeInit"),
    "hiar": ("stages.distillation", "HiAR"),
}
"""Name in a recipe -> (module of hiar_model.train, class); the class is made of (recipe, device)."""


def _check_made(recipe: Any) -> None:
    """ValueError where what an earlier stage leaves is not there: names the command that makes it."""
    kl = getattr(recipe, "forward_kl", None)
    named = {key: getattr(recipe, key, None) for key in ("init", "teacher", "trajectories")}
    named["forward_kl.trajectories"] = getattr(kl, "trajectories", None)
    named["data.folder"] = getattr(getattr(recipe, "data", None), "folder", None)
    for key, path in named.items():
        stage = next((s for s in shipped_recipes() if f"{path}/".startswith(f"runs/{s}/")), None)
        if stage is not None and not Path(str(path)).exists():
            raise ValueError(f"{key} {path}: is not there yet; this makes it: hiar train {stage}")


@own_settings()
def make_stage(recipe: Any, device: torch.device) -> Any:
    """The :class:`Stage` or :class:`Production` of a recipe, its networks on ``device``."""
    _check_made(recipe)
    module, name = STAGES[recipe.stage]
    return getattr(import_module(f"hiar_model.train.{module}"), name)(recipe, device)
