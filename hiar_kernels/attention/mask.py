"""Block-causal visibility by absolute frame ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.dispatch import is_whole

EMPTY = -1  # frame id of an empty cache slot
_UNBOUNDED = 2**62


@dataclass(frozen=True)
class BlockCausal:
    """Block-causal visibility over frames, with an optional sliding window and sink.

    Frames are cut into blocks of ``frames_per_block``; the first one may be shorter. Let a query's block end before
    frame E. It sees key frame j when ``j < E`` and, with a window W and k sink frames, when also
    ``j >= E - (W - k)`` or ``j < first_frame + k``. W counts the query's own block and need be no multiple of it.

    Args:
        frame_tokens: tokens of one latent frame.
        frames_per_block: latent frames of one block.
        window_frames: W in frames; None: unbounded; a sequence: one value for each row of the batch.
        sink_frames: k in frames; the first k frames of the video stay visible. k + frames_per_block <= W.
        first_frame: id of the video's first frame: blocks and the sink are counted from it.
        first_block_frames: frames of the first block; default ``frames_per_block``.
    """

    frame_tokens: int
    frames_per_block: int
    window_frames: int | None | tuple[int | None, ...] = None
    sink_frames: int = 0
    first_frame: int = 0
    first_block_frames: int | None = None

    def __post_init__(self) -> None:
        windows = self.window_frames
        if windows is not None and not isinstance(windows, int | Sequence) and hasattr(windows, "tolist"):
            object.__setattr__(self, "window_frames", windows.tolist())  # of numpy, a tensor: which cannot be hashed
        windows = self.window_frames if isinstance(self.window_frames, Sequence) else (self.window_frames,)
        numbers = [("frame_tokens", self.frame_tokens), ("frames_per_block", self.frames_per_block)]
        numbers += [("sink_frames", self.sink_frames), ("first_frame", self.first_frame)]
        numbers += [("window_frames", window) for window in windows if window is not None]
        if self.first_block_frames is not None:
            numbers.append(("first_block_frames", self.first_block_frames))
        for name, number in numbers:
            if not is_whole(number):
                raise ValueError(f"BlockCausal: {name} must be a whole number, got {number!r}")
            if name != "window_frames" and not isinstance(number, int):
                object.__setattr__(self, name, int(number))
        for name in ("frame_tokens", "frames_per_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"BlockCausal: {name} must be at least 1, got {getattr(self, name)}")
        if self.sink_frames < 0:
            raise ValueError(f"BlockCausal: sink_frames must be at least 0, got {self.sink_frames}")
        if isinstance(self.window_frames, Sequence) and not isinstance(self.window_frames, tuple):
            object.__setattr__(self, "window_frames", tuple(self.window_frames))
        for window in self.windows(None):
            if window is not None and window < self.sink_frames + self.frames_per_block:
                raise ValueError(
                    f"BlockCausal: window_frames must be at least sink_frames + frames_per_block = "
                    f"{self.sink_frames + self.frames_per_block}, got {window}"
                )
        first = self.first_block_frames
        if first is not None and not 1 <= first <= self.frames_per_block:
            raise ValueError(f"BlockCausal: first_block_frames must be 1 to {self.frames_per_block}, got {first}")

    def windows(self, rows: int | None) -> tuple[int | None, ...]:
        """The window of each batch row; ``rows`` None: as stored."""
        w = self.window_frames
        if not isinstance(w, tuple):
            return (w,) * (1 if rows is None else rows)
        if rows is not None and len(w) != rows:
            raise ValueError(f"BlockCausal: {len(w)} windows for a batch of {rows} rows; pass one or {rows}")
        return w

    def block_start(self, frames: Tensor) -> Tensor:
        """First frame (as if no block were short) of the block of each frame; int64, same shape."""
        short = 0 if self.first_block_frames is None else self.frames_per_block - self.first_block_frames
        origin, block = self.first_frame - short, self.frames_per_block
        return origin + (frames.long() - origin).div(block, rounding_mode="floor") * block

    def visible(self, q_frames: Tensor, kv_frames: Tensor, rows: int) -> Tensor:
        """bool [rows, Fq, Fk] for q_frames [rows or 1, Fq] and kv_frames [rows or 1, Fk]."""
        kv = kv_frames.long()[:, None, :]
        end = (self.block_start(q_frames) + self.frames_per_block)[:, :, None]
        visible_keys = (kv >= 0) & (kv < end)
        windows = self.windows(rows)
        if any(w is not None for w in windows):
            span = [_UNBOUNDED if w is None else w - self.sink_frames for w in windows]
            low = end - torch.tensor(span, device=kv.device)[:, None, None]
            visible_keys = visible_keys & ((kv >= low) | (kv < self.first_frame + self.sink_frames))
        return visible_keys.expand(rows, q_frames.shape[1], kv_frames.shape[1])


@dataclass(frozen=True, eq=False)
class KVContext:
    """Keys and values of earlier blocks beside a query's own. Gradients flow into k and v where they require them.

    Args:
        k, v: [B, Tc, H, D]. frames: int32 or int64 [B or 1, Tc / frame_tokens], -1 empty.
        host_frames: the same ids on the host, where they are known: :func:`attention_layout` need not read a device.
    """

    k: Tensor
    v: Tensor
    frames: Tensor
    host_frames: Sequence[Sequence[int]] | None = None

    @property
    def kv(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


def visible_with_context(mask: BlockCausal, q_frames: Tensor, own: Tensor, context: Tensor, rows: int) -> Tensor:
    """bool [rows, Fq, Fc + Fk]: context frames of *earlier* blocks by the rule, own frames only inside the block."""
    start = mask.block_start(q_frames)[:, :, None]
    earlier = mask.visible(q_frames, context, rows) & (context.long()[:, None, :] < start)
    inside = (mask.block_start(own)[:, None, :] == start) & (own[:, None, :] >= 0)
    return torch.cat([earlier, inside.expand(rows, q_frames.shape[1], own.shape[1])], dim=2)
