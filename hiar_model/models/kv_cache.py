"""Matched-noise caches: rings of frame slots, one row for each denoising step.

One tensor for each layer, [cache, batch, slot * frame_tokens, H, D], so that tasks at successive steps are rows of one
batch without copies. A frame's slot follows from its id alone: sink frames keep theirs, the others go round; eviction
is overwriting. Which slot holds which frame is written beside the keys (-1 empty), and visibility looks only there.

Where each ring stands is kept on the device and moves on there (:func:`hiar_kernels.ring_advance`), so that a captured
graph serves every block; the host keeps the same in plain numbers and never has to ask.

Keys may be kept in fewer bits than the network works in (``kv_dtype``; e4m3 with a scale for each layer, head and
frame slot). What a task sees is then read back into one scratch that all layers share, its own keys among it: every
walk sees the same numbers. In bfloat16 over e4m3 that moves 7 bytes for each number seen, beside the 2 that attention
reads.
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
    AttentionSchedule,
    BlockCausal,
    attention,
    attention_layout,
    attention_schedule,
    qk_norm_rope_append,
    ring_advance,
    takes_schedule,
)
from hiar_kernels.nvtx import span

from ..config import WanConfig
from .conditions import Live
from .fp8 import E4M3, bits, dequantize, quantize
from .transformer import Attend

CACHE_DTYPES = (E4M3, torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
        dtype: that the network works in. kv_dtype: that keys and values are kept in (one of ``CACHE_DTYPES``); None:
            the same.

    Attributes:
        k, v: of each layer [cache, batch, slot * frame_tokens, H, D]. k_scales, v_scales: of each layer float32
            [cache, batch, slot, H] where they are e4m3, else empty. scratch: k and v of one layer as read back, where
            they are kept in another dtype. frames: int32 [cache, batch, slot], -1 empty.

    Raises:
        ValueError: another ``kv_dtype``.
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
        kv_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.capacities, self.batch = config, tuple(capacities), batch
        self.frame_tokens, self.sink_frames = frame_tokens, sink_frames
        shape, kept = self.shape(config, capacities, batch, frame_tokens, heads), kv_dtype_of(dtype, kv_dtype)
        layers, scaled = range(config.num_layers), (*shape[:2], max(capacities), shape[3])
        self.k = [torch.empty(shape, dtype=kept, device=device) for _ in layers]
        self.v = [torch.empty(shape, dtype=kept, device=device) for _ in layers]
        scaled_layers = layers if kept == E4M3 else ()
        self.k_scales = [torch.ones(scaled, device=device, dtype=torch.float32) for _ in scaled_layers]
        self.v_scales = [torch.ones(scaled, device=device, dtype=torch.float32) for _ in scaled_layers]
        self.scratch: tuple[Tensor, ...] = ()
        if kept != dtype:
            self.scratch = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
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
        kv_dtype: torch.dtype | None = None,
    ) -> int:
        """Bytes that keys, values, their scales, the scratch and frame ids will take, before anything is allocated."""
        shape, kept = cls.shape(config, capacities, batch, frame_tokens, heads), kv_dtype_of(dtype, kv_dtype)
        numbers, slots = math.prod(shape), len(capacities) * batch * max(capacities)
        of_layer = numbers * kept.itemsize + (slots * shape[3] * torch.float32.itemsize if kept == E4M3 else 0)
        scratch = 0 if kept == dtype else 2 * numbers * dtype.itemsize
        return 2 * config.num_layers * of_layer + scratch + slots * torch.int32.itemsize

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
        """See to it that the next task of a cache begins at a frame; nothing to do where it stands there already."""
        if self.stands[cache] != frame:
            self.positions[cache].fill_(frame)
            self.stands[cache] = frame

    def rows(self, tensor: Tensor, caches: slice, slots: int) -> Tensor:
        """View [rows * batch, slots * tokens, ...] of the given caches' first slots; never a copy."""
        tokens = tensor.shape[2] // self.frames.shape[2]
        part = tensor[caches, :, : slots * tokens]
        return part.view(part.shape[0] * part.shape[1], *part.shape[2:])

    def seen(self, layer: int, caches: slice, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values as attention takes them, [rows * batch, slots * tokens, H, D]; valid until the next call."""
        kept = [self.rows(rings[layer], caches, slots) for rings in (self.k, self.v)]
        if self.scratch:
            whole = [self.rows(x, caches, slots) for x in self.scratch]
            if self.k_scales:
                scales = [self.rows(x[layer], caches, slots) for x in (self.k_scales, self.v_scales)]
                for values, scale, out in zip(kept, scales, whole, strict=True):
                    frames = (-1, self.frame_tokens)
                    dequantize(values.unflatten(1, frames), scale, out.unflatten(1, frames))
            else:
                for values, out in zip(kept, whole, strict=True):
                    out.copy_(values)
            kept = whole
        return kept[0], kept[1]

    def _tensors(self) -> dict[str, Tensor]:
        named = {"k": self.k, "v": self.v, "k_scale": self.k_scales, "v_scale": self.v_scales}
        found = {f"{name}.{i}": x for name, layers in named.items() for i, x in enumerate(layers)}
        return {**found, "frames": self.frames}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors, by name."""
        return {name: x.clone() for name, x in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of :meth:`state_dict` back in."""
        for name, tensor in self._tensors().items():
            given = state.get(name)
            if given is None or (given.shape, given.dtype) != (tensor.shape, tensor.dtype):
                found = "missing" if given is None else f"{given.dtype} {list(given.shape)}"
                raise ValueError(f"cache state: {name} must be {tensor.dtype} {list(tensor.shape)}, got {found}")
            tensor.copy_(given)
        self.held = self.frames[:, 0].tolist()
        self.stands = [None] * len(self.capacities)


class RingAttend(Attend):
    """:class:`hiar_model.models.transformer.Attend` of one kind of batch: append to the rings, then attend over them.

    What differs from task to task lies on the device: :meth:`enter` does the host's part of a task, :meth:`begin`
    the device's, and a graph that was captured from :meth:`begin` on serves every block.

    Args:
        cache: the rings. caches: which of them are the rows of this batch, as a slice.
        frames: of a task. done: for each cache, how many of them its ring moves on by.
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
        self.frames = torch.zeros(rows, frames, dtype=torch.int32, device=device)
        # where the visit's keys go, and where else a task that lends leaves them: in the ring before its own
        self.places = torch.zeros(2, rows, frames, dtype=torch.int32, device=device)
        self.slots = self.places[0]
        self.advance = torch.tensor(done, dtype=torch.int32, device=device).repeat_interleave(cache.batch)
        self.kv_frames = cache.rows(cache.frames, caches, self.used)
        # keys and values of each layer as attention takes them, views that stay; not where they are read back first
        kept = () if cache.scratch else zip(cache.k, cache.v, strict=True)
        self.rings = [tuple(cache.rows(x, caches, self.used) for x in pair) for pair in kept]
        self._shared = _SharedRows(cache, self.steps, self.lends) if any(lends) else None
        # for keys that are made apart and then stored: rows and slots to index with, slots of a ring of their own
        self._rows = torch.arange(rows, device=device)[:, None]
        self._slots = torch.zeros(rows, frames, dtype=torch.int64, device=device)
        self._in_order = torch.arange(frames, dtype=torch.int32, device=device)[None]
        self.layout: AttentionLayout | None = None
        # where the kernel goes by one: made on the device once a task, for all layers
        k = cache.rows(cache.scratch[0] if cache.scratch else cache.k[0], caches, self.used)
        self.by_schedule = takes_schedule(k[:, : frames * cache.frame_tokens], k, mask)
        self.schedule: AttentionSchedule | None = None

    def enter(self, starts: Sequence[int], layout: bool = True) -> AttentionLayout | None:
        """The host's part: the task of each cache begins at a frame, counted from the video's first.

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
        """The device's part: frame ids and slots of this task, noted in the rings, which move on."""
        cache, shared = self.cache, self._shared
        positions = cache.positions[self.caches].view(-1)
        options: dict[str, Any] = {"first_frame": self.first_frame, "sink_frames": cache.sink_frames}
        if shared is not None:  # the slots there; that ring holds the frames' ids already, and stays where it is
            there = {"advance": shared.none, "capacities": shared.sizes, **options}
            ring_advance(positions, self.frames, self.places[1], shared.ids, **there)
        here = {"advance": self.advance, "capacities": cache.sizes[self.caches].view(-1), **options}
        ring_advance(positions, self.frames, self.slots, self.kv_frames, **here)
        if self.stores:
            self._slots.copy_(self.slots)
        if self.by_schedule:
            rows, frames = self.frames.shape
            tokens, heads = cache.frame_tokens, cache.k[0].shape[3]
            shape = (rows, frames * tokens, heads, self.used * tokens)
            self.schedule = attention_schedule(shape, self.mask, self.frames, self.kv_frames, device=self.frames.device)

    def __call__(self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, live: Live | None) -> Tensor | None:
        cache, c = self.cache, self.cache.config
        options: dict[str, Any] = {"num_heads": c.num_heads, "grid": self.grid, "eps": c.eps, "theta": c.rope_theta}
        with span("qk_norm_rope_append"):
            q = self._append(layer, qkv, q_weight, k_weight, **options)
        if self.stores:
            for row, (step, lent) in enumerate(zip(self.steps, self.lends, strict=True)):
                if lent:
                    self._lend(layer, step, row * cache.batch)
        if live is not None and not live.rows:
            return None
        k, v = self.rings[layer] if self.rings else cache.seen(layer, self.caches, self.used)
        if live is None:
            return self._attend(q, k, v, 0, len(q), 0)
        parts = [self._attend(q, k, v, start, stop, live.first) for start, stop in live.runs()]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @property
    def stores(self) -> bool:
        """Whether keys and values are made apart and then stored, for what writes them cannot write the ring itself."""
        return bool(self.cache.scratch)

    def _append(self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, **options: Any) -> Tensor:
        """qkv -> q; keys and values go into the rings of the layer."""
        cache = self.cache
        if not cache.scratch and self._shared is not None:
            k, v = (rings[layer].flatten(0, 1) for rings in (cache.k, cache.v))
            options["rows"] = self._shared.rows
            return qk_norm_rope_append(qkv, q_weight, k_weight, self.frames, self.places, k, v, **options)
        if not cache.scratch:
            k, v = self.rings[layer]
            return qk_norm_rope_append(qkv, q_weight, k_weight, self.frames, self.slots, k, v, **options)
        k, v = qkv.new_empty(2, *qkv.shape[:2], *cache.k[layer].shape[3:])
        q = qk_norm_rope_append(qkv, q_weight, k_weight, self.frames, self._in_order, k, v, **options)
        self._store(layer, *(x.unflatten(1, (-1, cache.frame_tokens)) for x in (k, v)))
        return q

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [B, F, ..., H, D], tokens of a frame in one dimension or several, into the slots of the task, in the
        rings' own dtype.
        """
        cache, where = self.cache, (self._rows, self._slots)
        for rings, scales, new in ((cache.k, cache.k_scales, k), (cache.v, cache.v_scales, v)):
            if scales:
                new, scale = quantize(new.flatten(2, -3))
                cache.rows(scales[layer], self.caches, self.used)[where] = scale
            framed = cache.rows(rings[layer], self.caches, self.used).unflatten(1, (-1, *new.shape[2:-2]))
            bits(framed)[where] = bits(new.to(framed.dtype))

    def _lend(self, layer: int, step: int, row: int) -> None:
        """Copy this visit's keys and values into the ring of the step before, by that ring's own slots."""
        cache = self.cache
        sink, size = cache.sink_frames, cache.capacities[step - 1]
        frame, source = self.frames[row] - self.first_frame, self.slots[row]
        target = torch.where(frame < min(sink, size), frame, sink + (frame - sink) % max(1, size - sink))
        framed = [bits(ring).unflatten(2, (-1, cache.frame_tokens)) for ring in (cache.k[layer], cache.v[layer])]
        for slots in (*framed, *(scales[layer] for scales in (cache.k_scales, cache.v_scales) if scales)):
            slots[step - 1].index_copy_(1, target.long(), slots[step].index_select(1, source))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, first: int) -> Tensor:
        """Rows start..stop, queries from frame ``first`` on."""
        mask, frames, kv_frames, layout = self.mask, self.frames, self.kv_frames, self.layout
        schedule = self.schedule
        if first or stop - start < len(q):
            rows = slice(start, stop)
            mask = replace(mask, window_frames=mask.windows(len(q))[rows])
            q, k, v, kv_frames = q[rows, first * mask.frame_tokens :], k[rows], v[rows], kv_frames[rows]
            frames, layout = frames[rows, first:], None if layout is None else layout.select(start, stop, first)
            schedule = None  # of all rows and queries
        with span("attention"):
            out: Any = attention(
                q, k, v, mask=mask, q_frames=frames, kv_frames=kv_frames, layout=layout, schedule=schedule
            )
        return out


def kv_dtype_of(dtype: torch.dtype, kv_dtype: torch.dtype | None) -> torch.dtype:
    """What keys are kept in beside a network that works in ``dtype``; ValueError for what no cache can hold."""
    if kv_dtype is not None and kv_dtype not in CACHE_DTYPES:
        legal = ", ".join(str(x).removeprefix("torch.") for x in CACHE_DTYPES)
        found = str(kv_dtype).removeprefix("torch.")
        raise ValueError(f"kv_dtype must be one of {legal}, or None for that of the weights; got {found}")
    return dtype if kv_dtype is None else kv_dtype


class _SharedRows:
    """Where in all rings of a layer, [cache * batch, ...], the keys of a visit's batch rows go.

    Attributes:
        rows: int32 [2, B]: of their own rings, and of the rings before those, -1 where nothing is shared.
        sizes: frame slots of the latter. none: zeros [B], how far those move on. ids: room for the frame ids that
            :func:`hiar_kernels.ring_advance` writes beside slots, which nobody reads.
    """

    def __init__(self, cache: RingCache, steps: Sequence[int], lends: Sequence[bool]) -> None:
        batch, device = cache.batch, cache.frames.device
        own = [step * batch + b for step in steps for b in range(batch)]
        before = [row - batch if lent else -1 for row, lent in zip(own, (x for x in lends for _ in range(batch)))]
        self.rows = torch.tensor([own, before], dtype=torch.int32, device=device)
        index = torch.tensor([max(0, step - 1) for step in steps], device=device)
        self.sizes = cache.sizes[index].view(-1)
        self.none = torch.zeros(len(own), dtype=torch.int32, device=device)
        self.ids = torch.full((len(own), cache.frames.shape[2]), EMPTY, dtype=torch.int32, device=device)
