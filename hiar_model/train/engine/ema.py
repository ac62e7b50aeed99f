"""The running average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config.recipe import EmaRecipe


class Ema:
    """Average of the parameters of ``network``, plain or sharded: each process averages its own shards.

    weights   by name, float32 or wider: in bfloat16 an average with decay 0.999 stops at a quarter of its way. During
              the first ``recipe.start`` updates it is a copy of the weights
    """

    def __init__(self, network: nn.Module, recipe: EmaRecipe) -> None:
        self.network, self.recipe = network, recipe
        self.parameters = dict(network.named_parameters())
        self.weights = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.parameters.items()
        }

    def decay(self, update: int) -> float:
        """Decay of the ``update``-th update, counted from 0."""
        averaged = update - self.recipe.start
        if averaged < 0:
            return 0.0
        return min(self.recipe.decay, (averaged + 1) / (averaged + 10)) if self.recipe.ramp else self.recipe.decay

    @torch.no_grad()
    def update(self, update: int) -> None:
        """Add the weights after the ``update``-th update, counted from 0."""
        averages, new = _local(self.weights), _local(self.parameters)
        decay = self.decay(update)
        if decay == 0:
            torch._foreach_copy_(averages, new)
        else:
            torch._foreach_lerp_(averages, [x.to(a.dtype) for x, a in zip(new, averages)], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged weights inside the ``with`` block, and its own after it."""
        parameters, averages, training = _local(self.parameters), _local(self.weights), self.network.training
        own = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, averages)
        self.network.eval()
        try:
            yield
        finally:
            self.network.train(training)
            torch._foreach_copy_(parameters, own)


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """This process's shards of them, in place."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in (t.detach() for t in tensors.values())]
