"""Optimisers of one network, their learning rate over a run, and the norm of its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from ...models.transformer import HiARTransformer
from ..config.recipe import OptimizerRecipe


class Optimizers:
    """AdamW, or Muon and AdamW, for one network.

    Muon (arXiv 2502.16982) is for :func:`muon_matrices`; embeddings, head, norms and biases are AdamW's. Of sharded
    matrices it multiplies the shards: the same up to the rounding of its bfloat16, a percent or two of a step.
    """

    def __init__(self, network: HiARTransformer, recipe: OptimizerRecipe) -> None:
        self.network, self.recipe, self.parameters = network, recipe, list(network.parameters())
        matrices: list[Tensor] = []
        if recipe.kind == "muon_adamw":
            matrices = muon_matrices(network)
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

    def rate(self, progress: float) -> float:
        """The learning rate. ``progress``: share of the run before the step."""
        return self.recipe.lr * rate_factor(progress, self.recipe.warmup, self.recipe.cooldown)

    def step(self, progress: float) -> None:
        """One step with the current gradients, then drop them. ``progress``: share of the run before it."""
        rate = self.rate(progress)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of all parts by parameter name, for torch.distributed.checkpoint to save or load in place; before
        the first step it is created.
        """
        return get_optimizer_state_dict(self.network, self.parts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state of :meth:`state_dict`, of any number of ranks."""
        set_optimizer_state_dict(self.network, self.parts, dict(state))


def muon_matrices(network: HiARTransformer) -> list[Tensor]:
    """The weights that are Muon's where it is used: the matrices inside the blocks."""
    return [p for name, p in network.named_parameters() if name.startswith("blocks.") and p.dim() == 2]


def rate_factor(progress: float, warmup: float, cooldown: float) -> float:
    """Rises over ``warmup``, stays 1, falls linearly to 0 over the last ``cooldown``; all shares of the run."""
    rise = 1.0 if warmup == 0 else min(1.0, (progress + 1e-4) / warmup)
    fall = 1.0 if cooldown == 0 else min(1.0, max(0.0, (1 - progress) / cooldown))
    return min(rise, fall)
