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
way every task order sees the same numbers. :mod:`.cached_attention` writes and reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hiar_kernels import EMPTY, ring_advance
from hiar_kernels.common.float8 import E4M3, pack_values, padded

from ..common.checks import dtype_name
from ..config import RolloutConfig, WanConfig
from ..config.rollout import BLOCKWISE

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

    def advance(self, *ids: Tensor, **options: Any) -> None:
        """:func:`hiar_kernels.ring_advance` with the sink of these rings."""
        ring_advance(*ids, sink_frames=self.sink_frames, **options)

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

    def stored(self, layer: int) -> tuple[Tensor, ...]:
        """Keys, values, and in e4m3 their scales, of all rings of a layer, in the order in which the ops take them."""
        scales = (self.k_scales[layer], self.v_scales[layer]) if self.k_scales else ()
        return self.k[layer], self.v[layer], *scales

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


def kv_dtype_of(dtype: torch.dtype, kv_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of stored keys and values: ``kv_dtype``, or if None the model's; ValueError for an unknown one."""
    if kv_dtype is not None and kv_dtype not in CACHE_DTYPES:
        legal = ", ".join(map(dtype_name, CACHE_DTYPES))
        actual = dtype_name(kv_dtype)
        raise ValueError(f"kv_dtype must be one of {legal}, or None for that of the weights; got {actual}")
    return dtype if kv_dtype is None else kv_dtype
