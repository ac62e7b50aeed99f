"""Matched-noise caches: rings of frame slots, one row for each denoising step.

One tensor for each layer, [cache, batch, slot * frame_tokens, H, D], so that visits at successive steps are rows of one
batch without copies. A frame's slot follows from its id alone: sink frames keep theirs, the others go round; eviction
is overwriting. Which slot holds which frame is written beside the keys (-1 empty), and visibility looks only there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hiar_kernels import EMPTY, BlockCausal, attention, qk_norm_rope_append

from .config import WanConfig
from .transformer import Live


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
    """

    def __init__(
        self,
        config: WanConfig,
        capacities: Sequence[int],
        batch: int,
        frame_tokens: int,
        sink_frames: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.capacities, self.batch = config, tuple(capacities), batch
        self.frame_tokens, self.sink_frames = frame_tokens, sink_frames
        shape = self.shape(config, capacities, batch, frame_tokens)
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.frames = torch.full((shape[0], batch, max(capacities)), EMPTY, dtype=torch.int32, device=device)

    @staticmethod
    def shape(config: WanConfig, capacities: Sequence[int], batch: int, frame_tokens: int) -> tuple[int, ...]:
        """Of one layer's keys: [cache, batch, slot * frame_tokens, H, D]."""
        return len(capacities), batch, max(capacities) * frame_tokens, config.num_heads, config.head_dim

    @classmethod
    def memory_bytes(
        cls,
        config: WanConfig,
        capacities: Sequence[int],
        batch: int,
        frame_tokens: int,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Bytes that keys, values and frame ids will take, before anything is allocated."""
        numbers = math.prod(cls.shape(config, capacities, batch, frame_tokens))
        ids = len(capacities) * batch * max(capacities) * torch.int32.itemsize
        return 2 * config.num_layers * numbers * dtype.itemsize + ids

    def slots(self, cache: int, frames: Sequence[int]) -> list[int]:
        """Slot of each frame; frames are counted from the video's first."""
        sink, size = self.sink_frames, self.capacities[cache]
        return [f if f < size and f < sink else sink + (f - sink) % (size - sink) for f in frames]

    def reset(self) -> None:
        """Forget every frame."""
        self.frames.fill_(EMPTY)

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


class RingAttend:
    """:class:`hiar_model.transformer.Attend` of one batch of visits: append to the rings, then attend over them.

    Args:
        cache: the rings. caches: which of them are the rows of this batch, as a slice.
        frames: frame ids of the queries, one list for each cache, counted from the video's first frame.
        first_frame: id of that frame. mask: the rule, with one window for each batch row.
        lends: for each cache whether this visit's keys are also left in the cache before it.
    """

    def __init__(
        self,
        cache: RingCache,
        caches: slice,
        frames: list[list[int]],
        grid: tuple[int, int],
        first_frame: int,
        mask: BlockCausal,
        lends: Sequence[bool],
    ) -> None:
        self.cache, self.grid, self.mask, self.caches = cache, grid, mask, caches
        self.steps = list(range(caches.start, caches.stop, caches.step or 1))
        device = cache.frames.device
        self.used = max(cache.capacities[s] for s in self.steps)
        slots = [cache.slots(s, f) for s, f in zip(self.steps, frames, strict=True)]
        self.slots = torch.tensor(slots, device=device).repeat_interleave(cache.batch, 0)
        ids = torch.tensor(frames, dtype=torch.int32, device=device) + first_frame
        self.frames = ids.repeat_interleave(cache.batch, 0)
        held = cache.rows(cache.frames, caches, self.used)
        held.scatter_(1, self.slots, self.frames)
        self.kv_frames = held
        self.loans = [
            (s, torch.tensor(cache.slots(s, f), device=device), torch.tensor(cache.slots(s - 1, f), device=device))
            for s, f, lent in zip(self.steps, frames, lends, strict=True)
            if lent
        ]

    def __call__(self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, live: Live | None) -> Tensor | None:
        cache, c = self.cache, self.cache.config
        k, v = cache.rows(cache.k[layer], self.caches, self.used), cache.rows(cache.v[layer], self.caches, self.used)
        q = qk_norm_rope_append(
            qkv,
            q_weight,
            k_weight,
            self.frames,
            self.slots,
            k,
            v,
            num_heads=c.num_heads,
            grid=self.grid,
            eps=c.eps,
            theta=c.rope_theta,
        )
        for step, source, target in self.loans:
            for ring in (cache.k[layer], cache.v[layer]):
                framed = ring.unflatten(2, (-1, cache.frame_tokens))
                framed[step - 1, :, target] = framed[step, :, source]
        if live is None:
            return self._attend(q, k, v, 0, len(q), 0)
        if not live.rows:
            return None
        parts = [self._attend(q, k, v, start, stop, live.first) for start, stop in _runs(live.rows)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, first: int) -> Tensor:
        """Rows start..stop, queries from frame ``first`` on."""
        m, rows = self.mask, slice(start, stop)
        windows = m.windows(len(q))[rows]
        mask = BlockCausal(
            m.frame_tokens, m.frames_per_block, windows, m.sink_frames, m.first_frame, m.first_block_frames
        )
        out: Any = attention(
            q[rows, first * m.frame_tokens :],
            k[rows],
            v[rows],
            mask=mask,
            q_frames=self.frames[rows, first:],
            kv_frames=self.kv_frames[rows],
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
