"""The memory that a run holds all the time: said, and required of the device, before any weights are read."""

from __future__ import annotations

import torch

from ...config import WanConfig
from ...models.transformer import HiARTransformer
from ...planning.free_memory import SMALL, require_free
from ..config.recipe import HiARRecipe, TrainingRecipe
from .distributed import DistContext
from .optimizers import muon_matrices

_FLOAT = 4  # bytes


def resident_bytes(recipe: TrainingRecipe, shards: int = 1) -> int:
    """Bytes of one process without activations, in float32: weights, optimiser states, the average, and the gradients
    of the largest network, for only one has some at a time. ``shards``: processes that share one copy.
    """
    trained, frozen = {"": recipe.model}, []
    if isinstance(recipe, HiARRecipe):
        trained = {"student": recipe.model, "critic": recipe.critic_model or recipe.teacher_model}
        frozen = [recipe.teacher_model]
    networks = {name: _network(size) for name, size in trained.items()}
    states = sum(
        _numbers(network) * 2 - (_matrices(network) if recipe.optimizer_of(name).kind == "muon_adamw" else 0)
        for name, network in networks.items()
    )
    sizes = [_numbers(network) for network in networks.values()]
    average = _numbers(_network(recipe.model))
    count = sum(sizes) + states + max(sizes) + average + sum(_numbers(_network(size)) for size in frozen)
    return _FLOAT * count // shards


def require_memory_to_train(recipe: TrainingRecipe, context: DistContext) -> int:
    """:func:`resident_bytes` of this process.

    Raises:
        ValueError: one line: its device has not so many free.
    """
    nbytes = resident_bytes(recipe, recipe.scale.shard or context.world_size)
    if nbytes >= SMALL:
        require_free(nbytes, context.device, "weights, gradients, optimiser states and averages of a process")
    return nbytes


def _numbers(network: HiARTransformer) -> int:
    return sum(p.numel() for p in network.parameters())


def _matrices(network: HiARTransformer) -> int:
    return sum(p.numel() for p in muon_matrices(network))


def _network(size: str) -> HiARTransformer:
    with torch.device("meta"):
        return HiARTransformer(WanConfig.from_name(size))
