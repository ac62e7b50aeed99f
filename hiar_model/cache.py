"""Matched-noise caches: rings of frame slots, one row for each denoising step.

One tensor for each layer, [cache, batch, slot * frame_tokens, H, D], so that visits at successive steps are rows of one
batch without copies. A frame's slot follows from its id alone: sink frames keep theirs, the others go round; eviction
is overwriting. Which slot holds which frame is written beside the keys (-1 empty), and visibility looks only there.

Where each ring stands is kept on the device and moves on there (:func:`hiar_kernels.ring_advance`), so that a captured
graph serves every block; the host keeps the same in plain numbers and never has to ask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hiar_kernels import (
    EMPTY,
    AttentionLayout,
    BlockCausal,
    attention,
    attention_layout,
    qk_norm_rope_append,
    ring_advance,
)
from hiar_kernels.nvtx import span

from .config import WanConfig
from .transformer import Attend, Live


def ring_frames(window: int | None, total: int | None, extra: int = 0) -> int:
    """Frame slots that one step needs: its window and ``extra``, never more than the ``total`` frames of the video."""
    if window is None and total is None:
        raise ValueError("an endless video needs a window: give window_frames")
    bounds = [n for n in (None if window is None else window + extra, total) if n is not None]
    return min(bounds)


class RingCache:
    """Keys and values of every step's ring, for one rollout.

    Args:
        config: of the transformer. capacities: frame slots of each cache (:func:`ring_frames`).
        batch: videos. frame_tokens: tokens of a frame. sink_frames: first frames that are never overwritten.
        heads: how many are kept; None: all.
    """

    def __init__(
        self,
        config: WanConfig,
        capacities: Sequence[int],
        batch: int,
        frame_tokens: int,
        sink_frames: int = 0,
        *,
        heads: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.capacities, self.batch = config, tuple(capacities), batch
        self.frame_tokens, self.sink_frames = frame_tokens, sink_frames
        shape = self.shape(config, capacities, batch, frame_tokens, heads)
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.frames = torch.full((shape[0], batch, max(capacities)), EMPTY, dtype=torch.int32, device=device)
        self.positions = torch.zeros(shape[0], batch, dtype=torch.int32, device=device)
        self.sizes = torch.tensor(capacities, dtype=torch.int32, device=device)[:, None].repeat(1, batch)
        self.held = [[EMPTY] * max(capacities) for _ in capacities]  # frames, on the host
        self.stands: list[int | None] = [None] * len(capacities)  # positions, on the host; None: to be written

    @staticmethod
    def shape(
        config: WanConfig, capacities: Sequence[int], batch: int, frame_tokens: int, heads: int | None = None
    ) -> tuple[int, ...]:
        """Of one layer's keys: [cache, batch, slot * frame_tokens, H, D]."""
        return len(capacities), batch, max(capacities) * frame_tokens, heads or config.num_heads, config.head_dim

    @classmethod
    def memory_bytes(
        cls,
        config: WanConfig,
        capacities: Sequence[int],
        batch: int,
        frame_tokens: int,
        dtype: torch.dtype = torch.float32,
        heads: int | None = None,
    ) -> int:
        """Bytes that keys, values and frame ids will take, before anything is allocated."""
        numbers = math.prod(cls.shape(config, capacities, batch, frame_tokens, heads))
        ids = len(capacities) * batch * max(capacities) * torch.int32.itemsize
        return 2 * config.num_layers * numbers * dtype.itemsize + ids

    def slots(self, cache: int, frames: Sequence[int]) -> list[int]:
        """Slot of each frame; frames are counted from the video's first."""
        sink, size = self.sink_frames, self.capacities[cache]
        return [f if f < size and f < sink else sink + (f - sink) % (size - sink) for f in frames]

    def reset(self) -> None:
        """Forget every frame."""
        self.frames.fill_(EMPTY)
        for held in self.held:
            held[:] = [EMPTY] * len(held)
        self.stands = [None] * len(self.capacities)

    def stand_at(self, cache: int, frame: int) -> None:
        """See to it that the next visit of a cache begins at a frame; nothing to do where it stands there already."""
        if self.stands[cache] != frame:
            self.positions[cache].fill_(frame)
            self.stands[cache] = frame

    def rows(self, tensor: Tensor, caches: slice, slots: int) -> Tensor:
        """View [rows * batch, slots * tokens, ...] of the given caches' first slots; never a copy."""
        tokens = tensor.shape[2] // self.frames.shape[2]
        part = tensor[caches, :, : slots * tokens]
        return part.view(part.shape[0] * part.shape[1], *part.shape[2:])

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors, by name."""
        state = {f"k.{i}": k.clone() for i, k in enumerate(self.k)} | {
            f"v.{i}": v.clone() for i, v in enumerate(self.v)
        }
        return {**state, "frames": self.frames.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of :meth:`state_dict` back in."""
        own: dict[str, Tensor] = {f"k.{i}": k for i, k in enumerate(self.k)}
        own |= {f"v.{i}": v for i, v in enumerate(self.v)} | {"frames": self.frames}
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape:
                found = list(state[name].shape) if name in state else "missing"
                raise ValueError(f"cache state: {name} must be {list(tensor.shape)}, got {found}")
            tensor.copy_(state[name])
        self.held = self.frames[:, 0].tolist()
        self.stands = [None] * len(self.capacities)


class RingAttend(Attend):
    """:class:`hiar_model.transformer.Attend` of one kind of batch: append to the rings, then attend over them.

    What differs from visit to visit lies on the device: :meth:`enter` does the host's part of a visit, :meth:`begin`
    the device's, and a graph that was captured from :meth:`begin` on serves every block.

    Args:
        cache: the rings. caches: which of them are the rows of this batch, as a slice.
        frames: of a visit. done: for each cache, how many of them its ring moves on by.
        first_frame: id of the video's first frame. mask: the rule, with one window for each batch row.
        lends: for each cache whether this visit's keys are also left in the cache before it.
    """

    def __init__(
        self,
        cache: RingCache,
        caches: slice,
        frames: int,
        done: Sequence[int],
        grid: tuple[int, int],
        first_frame: int,
        mask: BlockCausal,
        lends: Sequence[bool],
    ) -> None:
        self.cache, self.grid, self.first_frame, self.mask, self.caches = cache, grid, first_frame, mask, caches
        self.steps = list(range(caches.start, caches.stop, caches.step or 1))
        self.done, self.lends = list(done), list(lends)
        self.used = max(cache.capacities[s] for s in self.steps)
        rows, device = len(self.steps) * cache.batch, cache.frames.device
        self.frames, self.slots = (torch.zeros(rows, frames, dtype=torch.int32, device=device) for _ in range(2))
        self.advance = torch.tensor(done, dtype=torch.int32, device=device).repeat_interleave(cache.batch)
        self.kv_frames = cache.rows(cache.frames, caches, self.used)
        self.layout: AttentionLayout | None = None

    def enter(self, starts: Sequence[int], layout: bool = True) -> AttentionLayout | None:
        """The host's part: the visit of each cache begins at a frame, counted from the video's first.

        Returns:
            What the queries will see, if asked; ``self.layout`` is to be it where attention should go by it.
        """
        count = self.frames.shape[1]
        queries = [[self.first_frame + f for f in range(start, start + count)] for start in starts]
        for step, start, done, ids in zip(self.steps, starts, self.done, queries, strict=True):
            self.cache.stand_at(step, start)
            for slot, frame in zip(self.cache.slots(step, range(start, start + count)), ids, strict=True):
                self.cache.held[step][slot] = frame
            self.cache.stands[step] = start + done
        if not layout:
            return None
        held = [self.cache.held[step][: self.used] for step in self.steps for _ in range(self.cache.batch)]
        rows = [ids for ids in queries for _ in range(self.cache.batch)]
        return attention_layout(self.mask, rows, held)

    def begin(self) -> None:
        """The device's part: frame ids and slots of this visit, noted in the rings, which move on."""
        cache = self.cache
        ring_advance(
            cache.positions[self.caches].view(-1),
            self.frames,
            self.slots,
            self.kv_frames,
            advance=self.advance,
            capacities=cache.sizes[self.caches].view(-1),
            first_frame=self.first_frame,
            sink_frames=cache.sink_frames,
        )

    def __call__(self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, live: Live | None) -> Tensor | None:
        cache, c = self.cache, self.cache.config
        k, v = cache.rows(cache.k[layer], self.caches, self.used), cache.rows(cache.v[layer], self.caches, self.used)
        options: dict[str, Any] = {"num_heads": c.num_heads, "grid": self.grid, "eps": c.eps, "theta": c.rope_theta}
        with span("qk_norm_rope_append"):
            q = self._append(qkv, q_weight, k_weight, k, v, **options)
        for row, (step, lent) in enumerate(zip(self.steps, self.lends, strict=True)):
            if lent:
                self._lend(layer, step, row * cache.batch)
        if live is None:
            return self._attend(q, k, v, 0, len(q), 0)
        if not live.rows:
            return None
        parts = [self._attend(q, k, v, start, stop, live.first) for start, stop in _runs(live.rows)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _append(self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """qkv -> q; keys and values go into the rings k, v."""
        return qk_norm_rope_append(qkv, q_weight, k_weight, self.frames, self.slots, k, v, **options)

    def _lend(self, layer: int, step: int, row: int) -> None:
        """Copy this visit's keys and values into the ring of the step before, by that ring's own slots."""
        cache = self.cache
        sink, size = cache.sink_frames, cache.capacities[step - 1]
        frame, source = self.frames[row] - self.first_frame, self.slots[row]
        target = torch.where(frame < min(sink, size), frame, sink + (frame - sink) % max(1, size - sink))
        for ring in (cache.k[layer], cache.v[layer]):
            framed = ring.unflatten(2, (-1, cache.frame_tokens))
            framed[step - 1].index_copy_(1, target.long(), framed[step].index_select(1, source))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, first: int) -> Tensor:
        """Rows start..stop, queries from frame ``first`` on."""
        rows = slice(start, stop)
        mask = replace(self.mask, window_frames=self.mask.windows(len(q))[rows])
        with span("attention"):
            out: Any = attention(
                q[rows, first * mask.frame_tokens :],
                k[rows],
                v[rows],
                mask=mask,
                q_frames=self.frames[rows, first:],
                kv_frames=self.kv_frames[rows],
                layout=None if self.layout is None else self.layout.select(start, stop, first),
            )
        return out


def _runs(rows: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs [start, stop) of neighbouring rows."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs
