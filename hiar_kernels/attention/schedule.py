"""Which key blocks each query tile sees, and which CTA of a persistent kernel attends to them: tables on the device.

Frame ids, windows and empty slots are read on the device, so nothing waits for it, a captured graph serves every block
of a video, and tables made once serve all layers of a forward.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_QUERIES = 128  # of one CTA
BLOCK_KEYS = 128  # of one step of its loop
BLOCK_FIELDS = 4  # start, stop, frame, partial
SEGMENT_FIELDS = 8  # tile, first block, last block + 1, slot for a partial result or -1, masked blocks of the tile


@dataclass(frozen=True, eq=False)
class AttentionSchedule:
    """The work of ``impl="gluon"``, made by :func:`hiar_kernels.attention_schedule`; all tensors int32 on the device.

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
        one_slot: no block leaves its frame slot, and whole ones name their slot in place of a frame (attention_fp8).
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
    one_slot: bool = False

    @property
    def q_tiles(self) -> int:
        """Query tiles of one head and batch item."""
        return self.counts.shape[1]

    @property
    def ctas(self) -> int:
        """Programs of the persistent grid."""
        return self.segments.shape[0]

    def outputs(self, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Memory for what a kernel writes, all of it contiguous and but for the first float32.

        Returns:
            out [B, Tq, H, head_dim] in dtype; logsumexp [B, H, Tq]; by slot the partial results [2 CTAs, 128, head_dim]
            and their logsumexp [2 CTAs, 128].
        """
        b, queries, h, _ = self.shape

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=self.blocks.device)

        return (
            empty(b, queries, h, head_dim, dtype=dtype),
            empty(b, h, queries),
            empty(2 * self.ctas, TILE_QUERIES, head_dim),
            empty(2 * self.ctas, TILE_QUERIES),
        )

    @property
    def tables(self) -> tuple[Tensor | int, ...]:
        """Arguments of a kernel, segments_ptr to q_tokens."""
        _, queries, h, _ = self.shape
        return (
            self.segments, self.segment_counts, self.blocks, self.limits, self.segments.shape[1], self.blocks.shape[2],
            self.q_tiles, h, queries,
        )  # fmt: skip

    def require_fits(self, q: Tensor, k: Tensor, one_slot: bool = False) -> None:
        """Raise ValueError in one line for tensors of other sizes, or for the other kernel."""
        op, sizes = "attention_fp8" if one_slot else "attention", (*q.shape[:3], k.shape[1])
        if sizes != self.shape:
            raise ValueError(f"{op}: schedule is of (B, Tq, H, Tk) {self.shape}, q and k have {sizes}")
        if one_slot != self.one_slot:
            raise ValueError(f"{op}: schedule must be made with one_slot={one_slot}, got {self.one_slot}")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of SMs of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_schedule(op: str, schedule: object) -> None:
    """Raise ValueError unless it is a schedule, or None: implementations that need none ignore it."""
    if schedule is not None and not isinstance(schedule, AttentionSchedule):
        raise ValueError(f"{op}: schedule must be an AttentionSchedule, or None, got {type(schedule).__name__}")


def allocate(
    shape: tuple[int, int, int, int],
    frame_tokens: int,
    sink_end: int,
    device: torch.device,
    ctas: int,
    one_slot: bool = False,
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
        one_slot=one_slot,
    )
