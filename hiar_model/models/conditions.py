"""Inputs of a transformer forward beside the latents: the timestep modulation, the prompt's keys and values, and which
outputs to compute. B batch, F latent frames, C width, H heads, D head width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modulation:
    """Embedded timesteps: ``embedding`` [B, F, C] for the head, ``blocks`` [B, F, 6, C] for every block.

    Each layer adds its own parameter ``own`` [1, 6, C] (head: [1, 2, C]) in its forward: a block sharded by FSDP has
    its weights, and passes gradients to them, only there.
    """

    embedding: Tensor
    blocks: Tensor

    @property
    def frames(self) -> int:
        """F."""
        return self.embedding.shape[1]

    def of_layer(self, layer: int, own: Tensor) -> tuple[Tensor, ...]:
        """shift1, scale1, gate1, shift2, scale2, gate2, each [B, F, C]."""
        return (own[:, None] + self.blocks).unbind(2)

    def of_head(self, own: Tensor) -> tuple[Tensor, ...]:
        """shift, scale, each [B, F, C]."""
        return (own[:, None] + self.embedding[:, :, None]).unbind(2)

    def select(self, selection: OutputSelection) -> Modulation:
        """The modulation of the selected batch items and frames."""
        return Modulation(selection.select(self.embedding), selection.select(self.blocks))


@dataclass(frozen=True)
class ModulationTable:
    """:class:`Modulation` with every layer's parameter already added, for inference with constant weights: ``vectors``
    [B, F, 6 layers + 2, C], the head's two last. Layers take views of it.
    """

    vectors: Tensor

    @property
    def frames(self) -> int:
        """F."""
        return self.vectors.shape[1]

    def at(self, levels: Tensor) -> ModulationTable:
        """Look up noise levels, int64 [B, F], in a table [1, levels, ...]: one copy for all layers."""
        return ModulationTable(self.vectors[0][levels])

    def of_layer(self, layer: int, own: Tensor) -> tuple[Tensor, ...]:
        """As of :class:`Modulation`."""
        return self.vectors[:, :, 6 * layer : 6 * layer + 6].unbind(2)

    def of_head(self, own: Tensor) -> tuple[Tensor, ...]:
        """As of :class:`Modulation`."""
        return self.vectors[:, :, -2:].unbind(2)

    def select(self, selection: OutputSelection) -> ModulationTable:
        """As of :class:`Modulation`."""
        return ModulationTable(selection.select(self.vectors))


@dataclass(frozen=True)
class CrossAttentionKV:
    """Keys and values of the prompt for cross-attention; they depend on weights and prompt only.

    Attributes:
        layers: k, v [B, L, H, D] of each layer. Empty in training, where each block projects ``embedded`` in its own
            forward: a block sharded by FSDP only has its weights there.
        counts: float32 [B or 1, L], how often each key occurs: all padding tokens are equal, so they are one key.
        embedded: the embedded prompt [B, L, C], in training.
        counted: False: every key occurs once, so attention need not read the counts.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    counts: Tensor
    embedded: Tensor | None = None
    counted: bool = True

    @property
    def batch(self) -> int:
        """B."""
        return len(self.layers[0][0] if self.embedded is None else self.embedded)

    def of(self, layer: int, kv: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """k, v of a layer; ``kv`` is its projection, used in training."""
        return self.layers[layer] if self.embedded is None else kv(self.embedded)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B of the keys, L, B of the counts or 0 if they are not used)."""
        k = self.layers[0][0]
        return k.shape[0], k.shape[1], self.counts.shape[0] if self.counted else 0


@dataclass(frozen=True)
class OutputSelection:
    """The batch items and frames whose output is computed; for the others only keys and values are.

    >>> OutputSelection((0, 1, 3)).runs()
    [(0, 2), (3, 4)]
    """

    items: tuple[int, ...]
    """Selected batch items, ascending."""
    first: int = 0
    """The first selected frame; all later ones are selected too."""
    _indices: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """``items`` on each device. Kept here because a captured graph reads the tensor as long as it is replayed."""

    def runs(self) -> list[tuple[int, int]]:
        """Ranges [start, stop) of consecutive batch items."""
        runs: list[tuple[int, int]] = []
        for item in self.items:
            if runs and runs[-1][1] == item:
                runs[-1] = (runs[-1][0], item + 1)
            else:
                runs.append((item, item + 1))
        return runs

    def of_batch(self, x: Tensor) -> Tensor:
        """x [B, ...] -> the selected items, a view if they are consecutive. x [1, ...], shared by all items, stays."""
        if x.shape[0] == 1:
            return x
        runs = self.runs()
        return x[slice(*runs[0])] if len(runs) == 1 else x[self._index(x)]

    def _index(self, x: Tensor) -> Tensor:
        """``items`` as a tensor; created once, because nothing may come from the host inside a captured graph."""
        if type(x) is not Tensor:  # a fake tensor: must not be kept for real ones
            return torch.tensor(self.items, device=x.device)
        if x.device not in self._indices:
            self._indices[x.device] = torch.tensor(self.items, device=x.device)
        return self._indices[x.device]

    def select(self, x: Tensor) -> Tensor:
        """x [B, F, ...] -> the selected items and frames [b, f, ...]."""
        return self.of_batch(x[:, self.first :])

    def tokens(self, x: Tensor, frame_tokens: int) -> Tensor:
        """x [B, T, ...] -> the tokens of the selected items and frames [b, t, ...]."""
        return self.select(x.unflatten(1, (-1, frame_tokens))).flatten(1, 2)
