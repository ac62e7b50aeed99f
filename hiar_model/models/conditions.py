"""What a forward of the transformer is given beside latents: modulation of the timesteps, keys of the prompt, and which
of its outputs are wanted. B batch, F latent frames, C width, H heads, D head width, L text tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modulation:
    """What the timesteps say to every layer: ``embedding`` [B, F, C] (head), ``blocks`` [B, F, 6, C].

    Each layer adds a parameter of its own, ``own`` [1, 6, C] (head: [1, 2, C]), in its forward: a sharded block (FSDP)
    has its weights there only, and a gradient reaches them there.
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

    def select(self, live: Live) -> Modulation:
        """The part that concerns the live rows and frames."""
        return Modulation(live.select(self.embedding), live.select(self.blocks))


@dataclass(frozen=True)
class ModulationTable:
    """The sums of :class:`Modulation` made once for constant weights, all layers in one tensor: ``vectors``
    [B, F, 6 layers + 2, C], the head's last. What a layer takes are views of it.
    """

    vectors: Tensor

    @property
    def frames(self) -> int:
        """F."""
        return self.vectors.shape[1]

    def at(self, levels: Tensor) -> ModulationTable:
        """Of a table [1, levels, ...] the rows of some levels, int64 [B, F]: one copy for all layers."""
        return ModulationTable(self.vectors[0][levels])

    def of_layer(self, layer: int, own: Tensor) -> tuple[Tensor, ...]:
        """As of :class:`Modulation`."""
        return self.vectors[:, :, 6 * layer : 6 * layer + 6].unbind(2)

    def of_head(self, own: Tensor) -> tuple[Tensor, ...]:
        """As of :class:`Modulation`."""
        return self.vectors[:, :, -2:].unbind(2)

    def select(self, live: Live) -> ModulationTable:
        """As of :class:`Modulation`."""
        return ModulationTable(live.select(self.vectors))


def _index(rows: tuple[int, ...], like: Tensor) -> Tensor:
    """Made once: inside a captured graph nothing may come from the host. For fake tensors each time: none is kept."""
    return _made_index(rows, like.device) if type(like) is Tensor else torch.tensor(rows, device=like.device)


@functools.lru_cache(maxsize=256)
def _made_index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, device=device)


@dataclass(frozen=True)
class TextKV:
    """Keys and values of the prompt, one pair for each layer: k, v [B, L, H, D]; ``counts`` [B or 1, L] how often each
    key occurs (padding tokens are all equal, so they are one key). They depend on weights and prompt only.

    In training there is the prompt itself instead, ``embedded`` [B, L, C], and each block makes its own in its forward:
    a sharded block (FSDP) has its weights there only, and a gradient that reached them later would be lost.

    ``counted`` False: every key occurs once, so attention need not look at the counts.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    counts: Tensor
    embedded: Tensor | None = None
    counted: bool = True
    log_counts: Tensor = field(init=False)
    """Logarithm of the counts in the keys' dtype: made once for all layers and tasks."""

    def __post_init__(self) -> None:
        dtype = (self.layers[0][0] if self.embedded is None else self.embedded).dtype
        wide = torch.promote_types(dtype, torch.float32)
        object.__setattr__(self, "log_counts", self.counts.to(wide).log().to(dtype))

    @property
    def batch(self) -> int:
        """Rows of the keys."""
        return len(self.layers[0][0] if self.embedded is None else self.embedded)

    def of(self, layer: int, kv: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """k, v of a layer, ``kv``: its projection."""
        return self.layers[layer] if self.embedded is None else kv(self.embedded)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows of the keys, L, rows of the counts, 0 where nothing is counted)."""
        k = self.layers[0][0]
        return k.shape[0], k.shape[1], self.counts.shape[0] if self.counted else 0


@dataclass(frozen=True)
class Live:
    """Rows and frames of a batch that are wanted beyond the last layer's keys and values; the others stop there."""

    rows: tuple[int, ...]
    first: int = 0  # frames from this one on

    def runs(self) -> list[tuple[int, int]]:
        """Runs [start, stop) of neighbouring rows."""
        runs: list[tuple[int, int]] = []
        for row in self.rows:
            if runs and runs[-1][1] == row:
                runs[-1] = (runs[-1][0], row + 1)
            else:
                runs.append((row, row + 1))
        return runs

    def of_rows(self, x: Tensor) -> Tensor:
        """x [B, ...] -> the live rows, a view where they are neighbours; what all rows share ([1, ...]) as it is."""
        if x.shape[0] == 1:
            return x
        runs = self.runs()
        return x[slice(*runs[0])] if len(runs) == 1 else x[_index(self.rows, x)]

    def select(self, x: Tensor) -> Tensor:
        """x [B, F, ...] -> the live [b, f, ...]."""
        return self.of_rows(x[:, self.first :])

    def tokens(self, x: Tensor, frame_tokens: int) -> Tensor:
        """x [B, T, ...] -> the live tokens."""
        return self.select(x.unflatten(1, (-1, frame_tokens))).flatten(1, 2)
