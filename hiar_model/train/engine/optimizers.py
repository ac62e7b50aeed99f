"""Optimisers of one network, their rate over a run, and the norm of its gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...models.transformer import HiARTransformer
from ..config.recipe import OptimizerRecipe

State = dict[str, Tensor]


class Optimizers:
    """AdamW, or Muon and AdamW, for one network.

    Muon (arXiv 2502.16982) is for the matrices inside the blocks; embeddings, head, norms and biases are AdamW's. Of
    sharded matrices it multiplies the shards: the same up to the rounding of its bfloat16, a percent or two of a step.
    """

    def __init__(self, network: HiARTransformer, recipe: OptimizerRecipe) -> None:
        self.recipe, self.parameters = recipe, list(network.parameters())
        self._names = {id(p): name for name, p in network.named_parameters()}
        matrices: list[Tensor] = []
        if recipe.kind == "muon_adamw":
            matrices = [p for n, p in network.named_parameters() if n.startswith("blocks.") and p.dim() == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.parameters if id(p) not in chosen]
        decay = 0.0 if matrices else recipe.weight_decay
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=recipe.lr, betas=recipe.betas, weight_decay=decay)
        ]
        if matrices:
            self.parts.append(
                torch.optim.Muon(
                    matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )

    def clip(self) -> Tensor:
        """Clip the gradients; returns their norm before, a tensor of one element."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, done: float) -> None:
        """One step with the gradients that are there, which are dropped. ``done``: share of the run before it."""
        rate = self.recipe.lr * rate_factor(done, self.recipe.warmup, self.recipe.cooldown)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> State:
        """Every tensor of the optimisers by name, in place: loading into them is loading into the optimisers.

        Called before the first step it makes them, with zeros for gradients.
        """
        if not all(part.state for part in self.parts):
            self._make()
        return dict(self._states())

    def _states(self) -> Iterator[tuple[str, Tensor]]:
        for part in self.parts:
            for parameter, state in part.state.items():
                for key, value in state.items():
                    yield f"{self._names[id(parameter)]}/{key}", value

    def _make(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = 0.0
            part.step()
            part.zero_grad(set_to_none=True)
        with torch.no_grad():
            for _, value in self._states():
                value.zero_()


def rate_factor(done: float, warmup: float, cooldown: float) -> float:
    """Rises over ``warmup``, stays 1, falls linearly to 0 over the last ``cooldown``; all shares of the run."""
    rise = 1.0 if warmup == 0 else min(1.0, (done + 1e-4) / warmup)
    fall = 1.0 if cooldown == 0 else min(1.0, max(0.0, (1 - done) / cooldown))
    return min(rise, fall)
