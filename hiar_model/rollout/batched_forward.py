"""One kind of batched forward, with everything that changes from task to task in device memory.

The same kind runs again and again: filled by the host, then run as it is, or replayed as a graph captured from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hiar_kernels import AttentionLayout, flow_step

from ..models.conditions import CrossAttentionKV, ModulationTable, OutputSelection
from ..models.kv_cache import CachedAttention
from ..models.transformer import HiARTransformer


class Captured(Protocol):
    """A sequence of device operations that can be run again: :mod:`hiar_model.rollout.cuda_graph`."""

    def replay(self) -> None:
        """Run the same operations on the same memory."""


Capture = Callable[[Callable[[], Any]], Captured]
"""Does what a function does, once, and captures it."""


@dataclass(frozen=True)
class GraphKey:
    """What a captured launch is fixed to.

    Attributes:
        model: identity of the weights. caches: (first, last, stride) of the rings that its rows are.
        rows: of each row the visits' kinds and frames, such as (("cache", 3), ("denoise", 3)).
        windows: of each row. lends: of each row whether the ring before it is written too. text: shape of the text.
        layout: the visible keys, where attention goes by them (a library); None: by frame ids on the device.
    """

    model: int
    caches: tuple[int, int, int]
    rows: tuple[tuple[tuple[str, int], ...], ...]
    windows: tuple[int | None, ...]
    lends: tuple[bool, ...]
    text: tuple[int, ...]
    layout: AttentionLayout | None = None

    @property
    def wanted(self) -> list[int]:
        """The rows that denoise."""
        return [i for i, row in enumerate(self.rows) if row[-1][0] == "denoise"]


class BatchedForward:
    """A kind of forward, its input buffers and its body.

    Args:
        model, table: the weights, and their modulation for every noise level. attend: of the rings.
        text: place of the text. shape: (C, H, W) of a latent frame. batch: videos.
        wide: dtype of noise levels. sde: steps take noise.
    """

    def __init__(
        self,
        kind: GraphKey,
        model: HiARTransformer,
        table: ModulationTable,
        attend: CachedAttention,
        text: CrossAttentionKV,
        shape: tuple[int, int, int],
        batch: int,
        wide: torch.dtype,
        sde: bool,
    ) -> None:
        self.kind, self.model, self.table, self.attend, self.text, self.batch = kind, model, table, attend, text, batch
        weight = model.patch_embedding.weight
        rows, frames = len(kind.rows) * batch, sum(count for _, count in kind.rows[0])
        self.x = torch.zeros(rows, frames, *shape, dtype=weight.dtype, device=weight.device)
        self.levels = torch.zeros(rows, frames, dtype=torch.int64, device=weight.device)
        wanted = kind.wanted
        denoised = kind.rows[wanted[0]][-1][1] if wanted else 0
        first = frames - denoised if wanted else 0
        self.selection: OutputSelection | None = None
        if first or len(wanted) < len(kind.rows):
            self.selection = OutputSelection(tuple(i * batch + b for i in wanted for b in range(batch)), first)
        self.sigmas = torch.zeros(2, len(wanted) * batch, 1, dtype=wide, device=weight.device)
        self.noise = self.x.new_zeros(len(wanted) * batch, denoised, *shape) if sde else None
        # x[s + 1] of each denoise task, one after the other, and whether it is finite
        self.out = self.x.new_zeros(len(wanted) * batch, denoised, *shape)
        self.finite = torch.ones(len(wanted), dtype=torch.bool, device=weight.device)
        self.captured: Captured | None = None
        self._told: dict[str, Any] = {}

    def fill(
        self,
        latents: Sequence[Sequence[Tensor]],
        levels: Sequence[Sequence[int]],
        sigmas: Sequence[Sequence[float]],
        noise: Sequence[Tensor | None],
    ) -> None:
        """Inputs of a task, copied to where the body reads them.

        Args:
            latents: of each row and task, [B, frames, C, H, W]. levels: of each row and frame, a row of the table.
            sigmas: of each denoise task (sigma, next sigma). noise: of each, None where it has no weight.
        """
        for i, tasks in enumerate(latents):
            place, first = self.x[i * self.batch : (i + 1) * self.batch], 0
            for x in tasks:
                place[:, first : first + x.shape[1]].copy_(x)
                first += x.shape[1]
        self._tell("levels", self.levels, [list(row) for row in levels for _ in range(self.batch)])
        if sigmas:
            pair = [[[level] for level in of for _ in range(self.batch)] for of in zip(*sigmas, strict=True)]
            self._tell("sigmas", self.sigmas, pair)
        if self.noise is not None:
            for i, drawn in enumerate(noise):
                if drawn is not None:
                    self.noise[i * self.batch : (i + 1) * self.batch].copy_(drawn, non_blocking=True)

    def _tell(self, name: str, place: Tensor, numbers: Any) -> None:
        """Write numbers from the host, where they are not there yet."""
        if self._told.get(name) != numbers:
            place.copy_(on_the_way(torch.tensor(numbers, dtype=place.dtype), place.device), non_blocking=True)
            self._told[name] = numbers

    def body(self) -> None:
        """The forward, and the step of the denoise tasks; on the device alone."""
        self.attend.advance_device()
        velocity = self.model.run(self.x, self.table.at(self.levels), self.text, self.attend, self.selection)
        if velocity is None:
            return
        x = self.x if self.selection is None else self.selection.select(self.x)
        self.out.copy_(flow_step(x, velocity, self.sigmas[0], self.sigmas[1], self.noise)[1])
        largest = torch.linalg.vector_norm(self.out.view(len(self.finite), -1), torch.inf, 1)  # NaN where there is one
        torch.lt(largest, torch.inf, out=self.finite)

    def run(self, capture: Capture | None = None) -> None:
        """The task that was filled in; replayed if it was captured before."""
        if self.captured is not None:
            self.captured.replay()
        elif capture is not None:
            self.captured = capture(self.body)
        else:
            self.body()


def on_the_way(x: Tensor, device: torch.device) -> Tensor:
    """x where a copy to the device need not be waited for."""
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
