"""The KV cache: keys and values of past frames in ring buffers, one ring for each denoising step (matched noise),
or one for all steps in turn where the task order allows it.

Keys and values are one tensor each for each layer, [ring, batch, slot * frame_tokens, H, D], so that tasks at
successive steps run as one batch without copies. The frame id determines the slot: sink frames keep theirs, later
frames overwrite the oldest. The frame id in each slot is stored beside the keys (-1: empty), and the attention mask
reads only those ids.

Write positions are advanced on the device (:func:`hiar_kernels.ring_advance`), so that one captured graph serves every
block. The host keeps the same numbers and never reads the device.

Keys and values may be stored in another dtype than the model's (``kv_dtype``). In e4m3 they have a scale for each
layer, frame and head, values lie transposed, and attention reads the ring itself (:func:`hiar_kernels.attention_fp8`).
Any other dtype is read, the current frames' too, through one scratch in the model's dtype shared by the layers. Either
way every task order sees the same numbers.
"""

from __future__ import annotations

import math
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
    ring_advance,
    takes_schedule,
)
from hiar_kernels.common.float8 import E4M3, pack_values, padded
from hiar_kernels.nvtx import span

from ..config import RolloutConfig, WanConfig
from ..config.rollout import BLOCKWISE
from .conditions import OutputSelection
from .transformer import SelfAttention

CACHE_DTYPES = (E4M3, torch.bfloat16, torch.float16, torch.float32, torch.float64)


class RingCache:
    """The KV cache of one rollout.

    Args:
        config: of the transformer. capacities: frame slots of each ring.
        batch: number of videos. frame_tokens: tokens of a frame. sink_frames: first frames, never overwritten.
        heads: attention heads that this process stores; None: all.
        dtype: of the model. kv_dtype: of the stored keys and values, one of ``CACHE_DTYPES``; None: ``dtype``.

    Attributes:
        k, v: for each layer [ring, batch, slot * frame_tokens, H, D]; v as e4m3: [ring, batch, slot, H, D, places], as
            :func:`hiar_kernels.append_fp8` writes it.
        k_scales, v_scales: for each layer float32 [ring, batch, slot, H] if stored as e4m3, else empty.
        scratch: k and v of one layer in the model's dtype, if stored in another but e4m3.
        frames: int32 [ring, batch, slot], the frame id in each slot, -1 empty; ``slot_frames``: the same on the host.
        positions: int32 [ring, batch], the next frame to write; ``write_position``: the same on the host, None where it
            has to be copied to the device.

    Raises:
        ValueError: an unknown ``kv_dtype``.

    >>> config = WanConfig(dim=24, ffn_dim=48, num_layers=1, num_heads=2, in_channels=4, out_channels=4, text_dim=8)
    >>> cache = RingCache(config, [6, 6], batch=1, frame_tokens=10, sink_frames=1)
    >>> cache.k[0].shape, cache.slots(0, [0, 5, 6, 7])
    (torch.Size([2, 1, 60, 2, 12]), [0, 5, 1, 2])
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
        shape, stored = self.shape(config, capacities, batch, frame_tokens, heads), kv_dtype_of(dtype, kv_dtype)
        layers, scale_shape = range(config.num_layers), (*shape[:2], max(capacities), shape[3])
        self.k = [torch.empty(shape, dtype=stored, device=device) for _ in layers]
        self.v = [torch.empty(self._shape_of_values(shape, stored), dtype=stored, device=device) for _ in layers]
        scaled_layers = layers if stored == E4M3 else ()
        self.k_scales = [torch.ones(scale_shape, device=device, dtype=torch.float32) for _ in scaled_layers]
        self.v_scales = [torch.ones(scale_shape, device=device, dtype=torch.float32) for _ in scaled_layers]
        self.scratch: tuple[Tensor, ...] = ()
        if stored not in (dtype, E4M3):
            self.scratch = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.frames = torch.full((shape[0], batch, max(capacities)), EMPTY, dtype=torch.int32, device=device)
        self.positions = torch.zeros(shape[0], batch, dtype=torch.int32, device=device)
        self.sizes = torch.tensor(capacities, dtype=torch.int32, device=device)[:, None].repeat(1, batch)
        self.slot_frames = [[EMPTY] * max(capacities) for _ in capacities]
        self.write_position: list[int | None] = [None] * len(capacities)

    @classmethod
    def of_rollout(
        cls,
        config: WanConfig,
        rollout: RolloutConfig,
        steps: Sequence[int],
        *,
        total: int | None,
        keep_all: bool = False,
        **options: Any,
    ) -> RingCache:
        """One ring for each of ``steps`` where the order needs it, else one for all steps: of the window (and a block
        where tasks are fused), at most the video's ``total`` frames (None: endless), or all of them.

        Args:
            keep_all: store every frame of the video. options: as for the class.
        """
        extra = rollout.frames_per_block if rollout.fuse_cache_denoise else 0
        windows = [None if keep_all or window is None else window + extra for window in rollout.windows]
        rings = [min(n for n in (window, total) if n is not None) for window in windows]
        # a ring that serves all steps must hold the widest of their windows
        capacities = [rings[s] for s in steps] if rollout.order in BLOCKWISE else [max(rings)]
        return cls(config, capacities, sink_frames=rollout.sink_frames, **options)

    @staticmethod
    def shape(
        config: WanConfig, capacities: Sequence[int], batch: int, frame_tokens: int, heads: int | None = None
    ) -> tuple[int, ...]:
        """Of one layer's keys: [ring, batch, slot * frame_tokens, H, D]."""
        return len(capacities), batch, max(capacities) * frame_tokens, heads or config.num_heads, config.head_dim

    def _shape_of_values(self, shape: tuple[int, ...], stored: torch.dtype) -> tuple[int, ...]:
        if stored != E4M3:
            return shape
        return (*shape[:2], max(self.capacities), *shape[3:], padded(self.frame_tokens))

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
        """Bytes of keys, values, scales, scratch and frame ids, computed without allocating anything."""
        shape, stored = cls.shape(config, capacities, batch, frame_tokens, heads), kv_dtype_of(dtype, kv_dtype)
        numbers, slots = math.prod(shape), len(capacities) * batch * max(capacities)
        if stored == E4M3:
            of_layer = (
                slots * shape[3] * ((frame_tokens + padded(frame_tokens)) * shape[4] + 2 * torch.float32.itemsize)
            )
        else:
            of_layer = 2 * numbers * stored.itemsize
        scratch = 0 if stored in (dtype, E4M3) else 2 * numbers * dtype.itemsize
        return config.num_layers * of_layer + scratch + slots * torch.int32.itemsize

    def slots(self, ring: int, frames: Sequence[int]) -> list[int]:
        """The slot of each frame in a ring; frames are counted from the video's first."""
        sink, size = self.sink_frames, self.capacities[ring]
        return [f if f < size and f < sink else sink + (f - sink) % (size - sink) for f in frames]

    def reset(self) -> None:
        """Mark every slot empty."""
        self.frames.fill_(EMPTY)
        for frames in self.slot_frames:
            frames[:] = [EMPTY] * len(frames)
        self.write_position = [None] * len(self.capacities)

    def seek(self, ring: int, frame: int) -> None:
        """Set the frame that the next task writes first; touches the device only if it is another one than now."""
        if self.write_position[ring] != frame:
            self.positions[ring].fill_(frame)
            self.write_position[ring] = frame

    def view(self, tensor: Tensor, rings: slice, slots: int) -> Tensor:
        """The first slots of some rings, [rings * batch, slots * tokens, ...]; never a copy."""
        tokens = tensor.shape[2] // self.frames.shape[2]
        part = tensor[rings, :, : slots * tokens]
        return part.view(part.shape[0] * part.shape[1], *part.shape[2:])

    def read(self, layer: int, rings: slice, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values in the model's dtype, [rings * batch, slots * tokens, H, D]; valid until the next call. Not
        of a cache in e4m3.
        """
        k, v = (self.view(layers[layer], rings, slots) for layers in (self.k, self.v))
        if not self.scratch:
            return k, v
        k_out, v_out = (self.view(x, rings, slots) for x in self.scratch)
        return k_out.copy_(k), v_out.copy_(v)

    def _tensors(self) -> dict[str, Tensor]:
        named = {"k": self.k, "v": self.v, "k_scale": self.k_scales, "v_scale": self.v_scales}
        tensors = {f"{name}.{i}": x for name, layers in named.items() for i, x in enumerate(layers)}
        return {**tensors, "frames": self.frames}

    @property
    def nbytes(self) -> int:
        """Bytes of :meth:`state_dict`."""
        return sum(x.nbytes for x in self._tensors().values())

    def state_dict(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """Copies of all tensors, by name; on their own device, or another."""
        return {name: x.to(device or x.device, copy=True) for name, x in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of :meth:`state_dict` back in; ValueError names one that is missing or of another shape.

        Values in e4m3 that lie like the keys, as earlier builds wrote them, are put in their order.
        """
        tensors = self._tensors()
        if self.k_scales:
            old = {f"v.{i}": (k.shape, E4M3) for i, k in enumerate(self.k)}
            state = {
                name: pack_values(x.unflatten(2, (-1, self.frame_tokens))) if old.get(name) == (x.shape, x.dtype) else x
                for name, x in state.items()
            }
        for name, tensor in tensors.items():
            saved = state.get(name)
            if saved is None or (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
                actual = "nothing" if saved is None else f"{saved.dtype} {list(saved.shape)}"
                raise ValueError(f"KV cache state: {name} must be {tensor.dtype} {list(tensor.shape)}, got {actual}")
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
        self.slot_frames = self.frames[:, 0].tolist()
        self.write_position = [None] * len(self.capacities)


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
        # k and v (and their scales) of each layer as attention reads them, if that needs no scratch.
        by_layer = [cache.k, cache.v, *((cache.k_scales, cache.v_scales) if cache.k_scales else ())]
        layers = () if cache.scratch else zip(*by_layer, strict=True)
        self._views = [tuple(cache.view(x, rings, self.used_slots) for x in layer) for layer in layers]
        self._shared = _SharedKV(cache, self.rings, self.shares_kv) if any(shares_kv) else None
        # For keys that are written separately: indices of items and slots, slots in a ring of the task's frames alone.
        self._items = torch.arange(batch, device=device)[:, None]
        self._slots = torch.zeros(batch, frames, dtype=torch.int64, device=device)
        self._in_order = torch.arange(frames, dtype=torch.int32, device=device)[None]
        self.layout: AttentionLayout | None = None
        # For kernels that use a schedule: computed on the device once a task, for all layers.
        self._by_schedule = self.float8_products and impl == "gluon"
        if not cache.k_scales:
            k = cache.view(cache.scratch[0] if cache.scratch else cache.k[0], rings, self.used_slots)
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
        options: dict[str, Any] = {"first_frame": self.first_frame, "sink_frames": cache.sink_frames}
        if shared is not None:  # only the slots: the ring before has these frames' ids and does not advance
            before = {"advance": shared.zeros, "capacities": shared.capacities, **options}
            ring_advance(positions, self.frames, self._targets[1], shared.unused_ids, **before)
        own = {"advance": self._advance, "capacities": cache.sizes[self.ring_slice].view(-1), **options}
        ring_advance(positions, self.frames, self.slots, self.kv_frames, **own)
        if separately or self.writes_separately:
            self._slots.copy_(self.slots)
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
        if selection is not None and not selection.rows:
            return None
        kv = self._views[layer] if self._views else self.cache.read(layer, self.ring_slice, self.used_slots)
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
            return self.slots, self._views[layer], None
        cache = self.cache
        named = [cache.k, cache.v, *((cache.k_scales, cache.v_scales) if cache.k_scales else ())]
        return self._targets, tuple(rings[layer].flatten(0, 1) for rings in named), self._shared.rows

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write k, v [B, F, ..., H, D], tokens of a frame in one dimension or several, into the task's slots, in the
        cache's dtype; shared ones also into the ring before it.
        """
        cache = self.cache
        if cache.k_scales:
            slots, rings, rows = self._destination(layer)
            append_fp8(k.flatten(1, -3), v.flatten(1, -3), slots, *rings, rows=rows)
            return
        for stored, new in ((cache.k, k), (cache.v, v)):
            framed = cache.view(stored[layer], self.ring_slice, self.used_slots).unflatten(1, (-1, *new.shape[2:-2]))
            framed[self._items, self._slots] = new.to(framed.dtype)
        for i, (ring, shares) in enumerate(zip(self.rings, self.shares_kv, strict=True)):
            if shares:
                self._copy_to_ring_before(layer, ring, i * cache.batch)

    def _queries(self, q: Tensor) -> tuple[Tensor, ...]:
        """Whole q [B, T, H, D] as attention takes it."""
        return quantize_rows(q) if self.float8_products else (q,)

    def _copy_to_ring_before(self, layer: int, ring: int, item: int) -> None:
        """Copy this task's keys and values into the ring before it, into that ring's own slots."""
        cache = self.cache
        sink, size = cache.sink_frames, cache.capacities[ring - 1]
        frame, source = self.frames[item] - self.first_frame, self.slots[item]
        target = torch.where(frame < min(sink, size), frame, sink + (frame - sink) % max(1, size - sink))
        for ring_of in (cache.k[layer], cache.v[layer]):
            slots = ring_of.unflatten(2, (-1, cache.frame_tokens))
            slots[ring - 1].index_copy_(1, target.long(), slots[ring].index_select(1, source))

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


def kv_dtype_of(dtype: torch.dtype, kv_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of stored keys and values: ``kv_dtype``, or if None the model's; ValueError for an unknown one."""
    if kv_dtype is not None and kv_dtype not in CACHE_DTYPES:
        legal = ", ".join(str(x).removeprefix("torch.") for x in CACHE_DTYPES)
        actual = str(kv_dtype).removeprefix("torch.")
        raise ValueError(f"kv_dtype must be one of {legal}, or None for that of the weights; got {actual}")
    return dtype if kv_dtype is None else kv_dtype


class _SharedKV:
    """For tasks that write their keys into two rings, with the rings of a layer as [ring * batch, ...].

    Attributes:
        rows: int32 [2, B]: each batch item's own ring, and the ring before it, -1 where nothing is shared.
        capacities: frame slots of the latter. zeros: int32 [B], how far those advance. unused_ids: receives the frame
            ids that :func:`hiar_kernels.ring_advance` writes beside the slots.
    """

    def __init__(self, cache: RingCache, rings: Sequence[int], shares_kv: Sequence[bool]) -> None:
        batch, device = cache.batch, cache.frames.device
        own = [ring * batch + b for ring in rings for b in range(batch)]
        shares = [x for x in shares_kv for _ in range(batch)]
        before = [row - batch if share else -1 for row, share in zip(own, shares, strict=True)]
        self.rows = torch.tensor([own, before], dtype=torch.int32, device=device)
        index = torch.tensor([max(0, ring - 1) for ring in rings], device=device)
        self.capacities = cache.sizes[index].view(-1)
        self.zeros = torch.zeros(len(own), dtype=torch.int32, device=device)
        self.unused_ids = torch.full((len(own), cache.frames.shape[2]), EMPTY, dtype=torch.int32, device=device)
