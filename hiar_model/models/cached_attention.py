"""Self-attention over the KV cache (:mod:`.kv_cache`): a task's keys and values into the rings, then attention.

Where the cache has the model's dtype, or e4m3, one kernel norms and rotates queries and keys and writes the rings.
Otherwise, and where several ranks or several videos make them together, keys and values come first and are written
after (:meth:`CachedAttention.write`). Both write to the same slots of the same rows: in the task's own ring and, for
shared keys, in the ring before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hiar_kernels import (
    EMPTY,
    AttentionLayout,
    AttentionSchedule,
    BlockCausal,
    append_fp8,
    attention,
    attention_fp8,
    attention_layout,
    attention_schedule,
    qk_norm_rope_append,
    qk_norm_rope_append_fp8,
    quantize_rows,
    takes_schedule,
)
from hiar_kernels.nvtx import span

from .conditions import OutputSelection
from .kv_cache import RingCache
from .self_attention import SelfAttention


class CachedAttention(SelfAttention):
    """Self-attention over the KV cache, for one kind of batched forward: append to the rings, then attend over them.

    Whatever differs from task to task lies on the device. :meth:`prepare_host` does the host's part of a task,
    :meth:`advance_device` the device's; a graph captured from :meth:`advance_device` on serves every block.

    Args:
        cache: the KV cache. rings: the rings whose tasks are the items of this batch, in this order.
        frames: frames of a task. advances: for each ring, how many frames it advances.
        grid: tokens of a frame, (rows, columns). first_frame: id of the video's first frame.
        mask: the visibility rule, with one window for each batch item.
        shares_kv: for each ring, whether the task also writes its keys into the ring before it.
        impl: of attention.
        float8_products: over a cache in e4m3, whether queries and probabilities are rounded to e4m3 too.
    """

    def __init__(
        self,
        cache: RingCache,
        rings: slice,
        frames: int,
        advances: Sequence[int],
        grid: tuple[int, int],
        first_frame: int,
        mask: BlockCausal,
        shares_kv: Sequence[bool],
        impl: str = "auto",
        float8_products: bool = False,
    ) -> None:
        self.impl, self.float8_products = impl, float8_products
        self.cache, self.grid, self.first_frame, self.mask, self.ring_slice = cache, grid, first_frame, mask, rings
        self.rings = list(range(rings.start, rings.stop, rings.step or 1))
        self.advances, self.shares_kv = list(advances), list(shares_kv)
        self.used_slots = max(cache.capacities[ring] for ring in self.rings)
        batch, device = len(self.rings) * cache.batch, cache.frames.device
        self.frames = torch.zeros(batch, frames, dtype=torch.int32, device=device)
        # Slots to write in the task's own ring and, for shared keys, in the ring before it.
        self._targets = torch.zeros(2, batch, frames, dtype=torch.int32, device=device)
        self.slots = self._targets[0]
        self._advance = torch.tensor(self.advances, dtype=torch.int32, device=device).repeat_interleave(cache.batch)
        self.kv_frames = cache.view(cache.frames, rings, self.used_slots)
        # Of each layer what is stored, in this batch's rings, and what it is widened into.
        layers = range(cache.config.num_layers)
        self._rings = [tuple(cache.view(x, rings, self.used_slots) for x in cache.stored(i)) for i in layers]
        self._scratch = tuple(cache.view(x, rings, self.used_slots) for x in cache.scratch)
        self._shared = _SharedKV(cache, self.rings, self.shares_kv) if any(shares_kv) else None
        # For keys that are written separately: rows [N, B, 1] and slots; slots in a ring of the task's frames alone.
        self._rows = torch.arange(batch, device=device)[None, :, None] if self._shared is None else self._shared.places
        self._slots = torch.zeros(len(self._rows), batch, frames, dtype=torch.int64, device=device)
        self._in_order = torch.arange(frames, dtype=torch.int32, device=device)[None]
        self.layout: AttentionLayout | None = None
        # For kernels that use a schedule: computed on the device once a task, for all layers.
        self._by_schedule = self.float8_products and impl == "gluon"
        if not cache.k_scales:
            k = (self._scratch or self._rings[0])[0]
            self._by_schedule = takes_schedule(k[:, : frames * cache.frame_tokens], k, mask, impl)
        self._schedule: AttentionSchedule | None = None

    def prepare_host(self, starts: Sequence[int], layout: bool = True) -> AttentionLayout | None:
        """The host's part of a task.

        Args:
            starts: first frame of the task in each ring, counted from the video's first frame.
            layout: whether to return the attention layout; store it in ``self.layout`` to have attention use it.
        """
        count = self.frames.shape[1]
        queries = [[self.first_frame + f for f in range(start, start + count)] for start in starts]
        for ring, start, advance, ids in zip(self.rings, starts, self.advances, queries, strict=True):
            self.cache.seek(ring, start)
            for slot, frame in zip(self.cache.slots(ring, range(start, start + count)), ids, strict=True):
                self.cache.slot_frames[ring][slot] = frame
            self.cache.write_position[ring] = start + advance
        if not layout:
            return None
        videos = range(self.cache.batch)
        keys = [self.cache.slot_frames[ring][: self.used_slots] for ring in self.rings for _ in videos]
        return attention_layout(self.mask, [ids for ids in queries for _ in videos], keys)

    def advance_device(self, separately: bool = False) -> None:
        """The device's part of a task: compute its frame ids and slots, enter them in the rings, advance the rings.

        ``separately``: the layers' keys and values come by :meth:`write`.
        """
        cache, shared = self.cache, self._shared
        positions = cache.positions[self.ring_slice].view(-1)
        options: dict[str, Any] = {"first_frame": self.first_frame}
        if shared is not None:  # only the slots: the ring before has these frames' ids and does not advance
            before = {"advance": shared.zeros, "capacities": shared.capacities, **options}
            cache.advance(positions, self.frames, self._targets[1], shared.unused_ids, **before)
        own = {"advance": self._advance, "capacities": cache.sizes[self.ring_slice].view(-1), **options}
        cache.advance(positions, self.frames, self.slots, self.kv_frames, **own)
        if separately or self.writes_separately:
            targets = self._targets[: len(self._slots)]
            self._slots.copy_(targets if shared is None else targets.where(shared.shares, targets[0]))
        if self._by_schedule:
            batch, frames = self.frames.shape
            tokens, heads = cache.frame_tokens, cache.k[0].shape[3]
            shape = (batch, frames * tokens, heads, self.used_slots * tokens)
            ids = (self.mask, self.frames, self.kv_frames)
            one_slot = self.float8_products
            self._schedule = attention_schedule(shape, *ids, device=self.frames.device, one_slot=one_slot)

    @contextmanager
    def with_impl(self, impl: str) -> Iterator[None]:
        """Another implementation of attention within this block."""
        before, self.impl = self.impl, impl
        try:
            yield
        finally:
            self.impl = before

    def __call__(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, selection: OutputSelection | None
    ) -> Tensor | None:
        c = self.cache.config
        options: dict[str, Any] = {"num_heads": c.num_heads, "grid": self.grid, "eps": c.eps, "theta": c.rope_theta}
        with span("qk_norm_rope_append"):
            q = self._append(layer, qkv, q_weight, k_weight, **options)
        return self._read(layer, q, qkv.dtype, selection)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write keys and values [B, T, H, D], normed and rotated, into the layer's rings."""
        self._write(layer, *(x.unflatten(1, (-1, self.cache.frame_tokens)) for x in (k, v)))

    def read(self, layer: int, q: Tensor, selection: OutputSelection | None) -> Tensor | None:
        """Attend over the layer's rings, where this task's keys are already: q [B, T, H, D], normed and rotated, ->
        [b, t, H, D] of the selection; None if it is empty.
        """
        return self._read(layer, self._queries(q), q.dtype, selection)

    def _read(
        self, layer: int, q: tuple[Tensor, ...], dtype: torch.dtype, selection: OutputSelection | None
    ) -> Tensor | None:
        if selection is not None and not selection.items:
            return None
        kv = self._rings[layer]
        if self._scratch:
            kv = tuple(wide.copy_(x) for wide, x in zip(self._scratch, kv, strict=True))
        if selection is None:
            return self._attend(q, kv, dtype, 0, len(self.frames), 0)
        parts = [self._attend(q, kv, dtype, start, stop, selection.first) for start, stop in selection.runs()]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @property
    def writes_separately(self) -> bool:
        """Whether keys and values are computed first, then written: the kernel cannot write the rings itself."""
        return bool(self.cache.scratch)

    def _append(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, **options: Any
    ) -> tuple[Tensor, ...]:
        """qkv -> q, or q in e4m3 and its scales; writes keys and values into the layer's rings."""
        cache = self.cache
        if cache.scratch:
            k, v = qkv.new_empty(2, *qkv.shape[:2], *cache.k[layer].shape[3:])
            q = qk_norm_rope_append(qkv, q_weight, k_weight, self.frames, self._in_order, k, v, **options)
            self.write(layer, k, v)
            return (q,)
        slots, rings, options["rows"] = self._destination(layer)
        if not cache.k_scales:
            return (qk_norm_rope_append(qkv, q_weight, k_weight, self.frames, slots, *rings, **options),)
        options["quantize_q"] = self.float8_products
        result = qk_norm_rope_append_fp8(qkv, q_weight, k_weight, self.frames, slots, *rings, **options)
        return result if isinstance(result, tuple) else (result,)

    def _destination(self, layer: int) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Where a kernel writes: slots; keys and values (and scales) of the layer; rows of the rings, None: its own."""
        if self._shared is None:
            return self.slots, self._rings[layer], None
        return self._targets, tuple(x.flatten(0, 1) for x in self.cache.stored(layer)), self._shared.rows

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write k, v [B, F, ..., H, D], tokens of a frame in one dimension or several, where :meth:`_destination` says,
        in the cache's dtype.
        """
        slots, rings, rows = self._destination(layer)
        if self.cache.k_scales:
            append_fp8(k.flatten(1, -3), v.flatten(1, -3), slots, *rings, rows=rows)
            return
        for ring, new in zip(rings, (k, v), strict=True):
            frames = ring.unflatten(1, (-1, *new.shape[2:-2]))
            for place in zip(self._rows, self._slots, strict=True):
                frames[place] = new.to(ring.dtype)

    def _queries(self, q: Tensor) -> tuple[Tensor, ...]:
        """Whole q [B, T, H, D] as attention takes it."""
        return quantize_rows(q) if self.float8_products else (q,)

    def _attend(
        self, q: tuple[Tensor, ...], kv: tuple[Tensor, ...], dtype: torch.dtype, start: int, stop: int, first: int
    ) -> Tensor:
        """Attention of batch items start..stop, queries from frame ``first`` on."""
        mask, frames, kv_frames, layout = self.mask, self.frames, self.kv_frames, self.layout
        schedule, batch = self._schedule, len(self.frames)
        if first or stop - start < batch:
            items = slice(start, stop)
            mask = replace(mask, window_frames=mask.windows(batch)[items])
            q, kv = tuple(x[items, first * mask.frame_tokens :] for x in q), tuple(x[items] for x in kv)
            frames, kv_frames = frames[items, first:], kv_frames[items]
            layout = None if layout is None else layout.select(start, stop, first)
            schedule = None  # it is valid for the whole batch only
        ids: dict[str, Any] = {"mask": mask, "q_frames": frames, "kv_frames": kv_frames, "impl": self.impl}
        with span("attention"):
            if not self.cache.k_scales:
                return attention(q[0], *kv, layout=layout, schedule=schedule, **ids)
            if not self.float8_products:
                return attention_fp8(q[0], *kv, **ids)
            return attention_fp8(q[0], *kv, q_scales=q[1], out_dtype=dtype, schedule=schedule, **ids)


class _SharedKV:
    """For tasks that write their keys into two rings, with the rings of a layer as [ring * batch, ...].

    Attributes:
        rows: int32 [2, B]: each batch item's own ring, and the ring before it, -1 where nothing is shared.
        shares: bool [2, B, 1]: False where rows are -1. places: int64 [2, B, 1]: rows, the own one once more there.
        capacities: frame slots of the latter. zeros: int32 [B], how far those advance. unused_ids: receives the frame
            ids that :func:`hiar_kernels.ring_advance` writes beside the slots.
    """

    def __init__(self, cache: RingCache, rings: Sequence[int], shares_kv: Sequence[bool]) -> None:
        batch, device = cache.batch, cache.frames.device
        own = [ring * batch + b for ring in rings for b in range(batch)]
        shares = [x for x in shares_kv for _ in range(batch)]
        before = [row - batch if share else -1 for row, share in zip(own, shares, strict=True)]
        self.rows = torch.tensor([own, before], dtype=torch.int32, device=device)
        self.shares = (self.rows >= 0)[..., None]
        self.places = self.rows.where(self.rows >= 0, self.rows[0]).long()[..., None]
        index = torch.tensor([max(0, ring - 1) for ring in rings], device=device)
        self.capacities = cache.sizes[index].view(-1)
        self.zeros = torch.zeros(len(own), dtype=torch.int32, device=device)
        self.unused_ids = torch.full((len(own), cache.frames.shape[2]), EMPTY, dtype=torch.int32, device=device)
