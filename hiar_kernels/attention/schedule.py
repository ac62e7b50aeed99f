"""Which key blocks each query tile sees, and which CTA of a persistent kernel attends to them: tables on the device.

Frame ids, windows and empty slots are read on the device, so nothing waits for it, a captured graph serves every block
of a video, and tables made once serve all layers of a forward.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common import triton_loader
from .mask import BlockCausal

TILE_QUERIES = 128  # of one CTA
BLOCK_KEYS = 128  # of one step of its loop
BLOCK_FIELDS = 4  # start, stop, frame, partial
SEGMENT_FIELDS = 8  # tile, first block, last block + 1, slot for a partial result or -1, masked blocks of the tile


@dataclass(frozen=True)
class AttentionSchedule:
    """The work of ``impl="gluon"``, made by :func:`attention_schedule`; all tensors int32 on the device.

    A query tile is 128 queries of one head and batch item, number ``(item * heads + head) * q_tiles + tile``. Every CTA
    first does whole tiles, ``rounds`` of them, so that neighbours walk the same keys; the tiles of the last, unfilled
    round are cut into equal ranges of key blocks, one for each CTA, and their partial results merged.

    Attributes:
        blocks: [B, q_tiles, most, 4] key blocks that a tile sees: first key, last key + 1, frame, 1 where only some
            queries see it. Those that need a mask come first, each inside one frame slot.
        counts: [B, q_tiles, 2] masked blocks, all blocks (at least 1: a tile that sees nothing has an empty one).
        limits: [B, q_tiles, 2, 128] of each query the frame after its block, and the first frame in its window.
        segments: [CTAs, most, 8] tile, first block, last block + 1, slot or -1, masked blocks of the tile.
        segment_counts: [CTAs].
        cuts: [tiles of the last round, 2] key blocks before and of each.
        shape: (B, Tq, H, Tk) that it is of. frame_tokens: of a frame slot; Tk without a mask.
        sink_end: frames below it are always visible.
    """

    blocks: Tensor
    counts: Tensor
    limits: Tensor
    segments: Tensor
    segment_counts: Tensor
    cuts: Tensor
    shape: tuple[int, int, int, int]
    frame_tokens: int
    sink_end: int

    @property
    def q_tiles(self) -> int:
        """Query tiles of one head and batch item."""
        return self.counts.shape[1]

    @property
    def ctas(self) -> int:
        """Programs of the persistent grid."""
        return self.segments.shape[0]

    def require_fits(self, q: Tensor, k: Tensor) -> None:
        """Raise ValueError in one line for tensors of other sizes."""
        sizes = (*q.shape[:3], k.shape[1])
        if sizes != self.shape:
            raise ValueError(f"attention: schedule is of (B, Tq, H, Tk) {self.shape}, q and k have {sizes}")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of SMs of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def attention_schedule(
    shape: tuple[int, int, int, int],
    mask: BlockCausal | None = None,
    q_frames: Tensor | None = None,
    kv_frames: Tensor | None = None,
    *,
    device: torch.device | str,
    ctas: int | None = None,
) -> AttentionSchedule:
    """What :func:`hiar_kernels.attention` with ``impl="gluon"`` does for such a call; it launches two small kernels.

    Args:
        shape: (B, Tq, H, Tk). mask, q_frames, kv_frames: as for ``attention``; frame ids int32 on the device.
        ctas: programs of the grid; default: one for each SM of the device.

    Raises:
        ValueError: lengths are no multiples of the mask's frame_tokens.

    Example (on a GPU)::

        schedule = attention_schedule((1, 4680, 12, 32760), mask, q_frames, kv_frames, device="cuda")
        for q, k, v in layers:
            out = attention(q, k, v, mask=mask, q_frames=q_frames, kv_frames=kv_frames, schedule=schedule, impl="gluon")
    """
    _, queries, _, keys = shape
    tokens = keys if mask is None else mask.frame_tokens
    for name, n in (("Tq", queries), ("Tk", keys)):
        whole = mask is None or n % tokens == 0
        if not (n > 0 and whole):
            raise ValueError(f"attention_schedule: {name} must be a positive multiple of {tokens}, got {n}")
    triton_loader.load("attention", torch.empty(0, device=device))
    from .triton_schedule import make

    return make(shape, mask, q_frames, kv_frames, torch.device(device), ctas)


def allocate(
    shape: tuple[int, int, int, int], frame_tokens: int, sink_end: int, device: torch.device, ctas: int
) -> AttentionSchedule:
    """Allocate the tables for a call of this shape."""
    batch, queries, heads, keys = shape
    q_tiles = -(-queries // TILE_QUERIES)
    most = keys // frame_tokens * -(-frame_tokens // BLOCK_KEYS)
    tiles = batch * heads * q_tiles
    ctas = min(ctas, tiles * most)
    rounds, rest = divmod(tiles, ctas)

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int32, device=device)

    return AttentionSchedule(
        blocks=empty(batch, q_tiles, most, BLOCK_FIELDS),
        counts=empty(batch, q_tiles, 2),
        limits=empty(batch, q_tiles, 2, TILE_QUERIES),
        segments=empty(ctas, rounds + rest, SEGMENT_FIELDS),
        segment_counts=empty(ctas),
        cuts=empty(rest, 2),
        shape=shape,
        frame_tokens=frame_tokens,
        sink_end=sink_end,
    )
