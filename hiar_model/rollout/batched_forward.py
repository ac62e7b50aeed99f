"""One kind of batched forward. Everything that changes from task to task lives in device memory.

The host fills the input buffers; then the forward runs eagerly, or is replayed as a CUDA graph captured from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hiar_kernels import AttentionLayout, flow_step

from ..models.cached_attention import CachedAttention
from ..models.conditions import CrossAttentionKV, ModulationTable, OutputSelection
from ..models.transformer import HiARTransformer


class Captured(Protocol):
    """A captured sequence of device operations: see :mod:`hiar_model.common.cuda_graph`."""

    def replay(self) -> None:
        """Run the same operations on the same memory."""


Capture = Callable[[Callable[[], Any]], Captured]
"""Runs a function once and captures its device operations."""


@dataclass(frozen=True)
class GraphKey:
    """What is fixed in a captured forward.

    Attributes:
        model: id() of the network. caches: (first, last, stride) of the KV caches that the batch items use.
        items: for each batch item, the kind and frame count of its tasks, such as (("cache", 3), ("denoise", 3)).
        windows: of each batch item. shares_kv: for each, whether it also writes the cache before its own
            (``kv_source="next_step"``). prompt_shape: of the cross-attention KV.
        layout: visible keys, for attention libraries that need them on the host; None: frame ids on the device.
    """

    model: int
    caches: tuple[int, int, int]
    items: tuple[tuple[tuple[str, int], ...], ...]
    windows: tuple[int | None, ...]
    shares_kv: tuple[bool, ...]
    prompt_shape: tuple[int, ...]
    layout: AttentionLayout | None = None

    @property
    def denoising(self) -> list[int]:
        """Indices of the batch items that denoise."""
        return [i for i, item in enumerate(self.items) if item[-1][0] == "denoise"]


class BatchedForward:
    """A forward with its input and output buffers.

    Args:
        model, table: the network, and its modulation at every noise level. attend: self-attention over the KV caches.
        prompt_kv: of the cross-attention. shape: (C, H, W) of a latent frame. batch: videos.
        sigma_dtype: of noise levels. sde: whether steps add noise.
    """

    def __init__(
        self,
        key: GraphKey,
        model: HiARTransformer,
        table: ModulationTable,
        attend: CachedAttention,
        prompt_kv: CrossAttentionKV,
        shape: tuple[int, int, int],
        batch: int,
        sigma_dtype: torch.dtype,
        sde: bool,
    ) -> None:
        self.key, self.model, self.table, self.attend, self.batch = key, model, table, attend, batch
        self.prompt_kv = prompt_kv
        weight = model.patch_embedding.weight
        samples, frames = len(key.items) * batch, sum(count for _, count in key.items[0])
        self.x = torch.zeros(samples, frames, *shape, dtype=weight.dtype, device=weight.device)
        self.levels = torch.zeros(samples, frames, dtype=torch.int64, device=weight.device)
        denoising = key.denoising
        denoised = key.items[denoising[0]][-1][1] if denoising else 0
        first = frames - denoised if denoising else 0
        self.selection: OutputSelection | None = None
        if first or len(denoising) < len(key.items):
            self.selection = OutputSelection(tuple(i * batch + b for i in denoising for b in range(batch)), first)
        self.sigmas = torch.zeros(2, len(denoising) * batch, 1, dtype=sigma_dtype, device=weight.device)
        self.noise = self.x.new_zeros(len(denoising) * batch, denoised, *shape) if sde else None
        # x[s + 1] of the denoise tasks in order, and whether each is finite
        self.out = self.x.new_zeros(len(denoising) * batch, denoised, *shape)
        self.finite = torch.ones(len(denoising), dtype=torch.bool, device=weight.device)
        self.captured: Captured | None = None
        self._host_values: dict[str, Any] = {}

    def fill(
        self,
        latents: Sequence[Sequence[Tensor]],
        levels: Sequence[Sequence[int]],
        sigmas: Sequence[Sequence[float]],
        noise: Sequence[Tensor | None],
    ) -> None:
        """Copy the inputs of the tasks into the buffers.

        Args:
            latents: [B, frames, C, H, W] for each batch item and task. levels: index into the modulation table for each
                batch item and frame.
            sigmas: (sigma, next sigma) of each denoise task. noise: of each denoise task; None where its weight is 0.
        """
        for i, tasks in enumerate(latents):
            buffer, first = self.x[i * self.batch : (i + 1) * self.batch], 0
            for x in tasks:
                buffer[:, first : first + x.shape[1]].copy_(x)
                first += x.shape[1]
        self._write("levels", self.levels, [list(item) for item in levels for _ in range(self.batch)])
        if sigmas:
            values = [[[level] for level in of for _ in range(self.batch)] for of in zip(*sigmas, strict=True)]
            self._write("sigmas", self.sigmas, values)
        if self.noise is not None:
            for i, drawn in enumerate(noise):
                if drawn is not None:
                    self.noise[i * self.batch : (i + 1) * self.batch].copy_(drawn, non_blocking=True)

    def _write(self, name: str, buffer: Tensor, values: Any) -> None:
        """Copy host values to the device unless they are already there."""
        if self._host_values.get(name) != values:
            buffer.copy_(pinned(torch.tensor(values, dtype=buffer.dtype), buffer.device), non_blocking=True)
            self._host_values[name] = values

    def body(self) -> None:
        """The forward and the denoising step: device operations only."""
        self.attend.advance_device()
        velocity = self.model.run(self.x, self.table.at(self.levels), self.prompt_kv, self.attend, self.selection)
        if velocity is not None:
            self.denoise(velocity)

    def denoise(self, velocity: Tensor) -> None:
        """The denoising step alone, with the velocity of the selection."""
        x = self.x if self.selection is None else self.selection.select(self.x)
        self.out.copy_(flow_step(x, velocity, self.sigmas[0], self.sigmas[1], self.noise)[1])
        largest = torch.linalg.vector_norm(self.out.view(len(self.finite), -1), torch.inf, 1)  # propagates NaN
        torch.lt(largest, torch.inf, out=self.finite)

    def run(self, capture: Capture | None = None) -> None:
        """Run on the filled buffers: replay the graph if there is one, else capture it or run eagerly."""
        if self.captured is not None:
            self.captured.replay()
        elif capture is not None:
            self.captured = capture(self.body)
        else:
            self.body()


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor in pinned memory if the device is CUDA, so that copies to it are asynchronous."""
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
