"""Decoding of finished blocks to frames, in order, asynchronously where the decoder allows it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hiar_kernels.nvtx import span

if TYPE_CHECKING:
    from ..io.video import Frames
    from ..models.video_model import Decoder

_PENDING, _BLOCK = "waiting", "waiting_block"  # keys of saved states


class Decoding:
    """Decodes the blocks of one video.

    A decoder with a CUDA stream of its own decodes a block while the transformer makes the next one, so frames come one
    block late (``asynchronous``). Others decode at once.

    seconds: time that :meth:`put` and :meth:`flush` waited for frames.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder: Any = decoder
        self.asynchronous = getattr(decoder, "stream", None) is not None
        self.seconds = 0.0
        self._pending: tuple[int, Any] | None = None

    def skip(self, latents: Tensor) -> None:
        """Decode latents whose frames are known, for the decoder's state only."""
        with span("decode", "prefix"):
            self.decoder.decode(latents)

    def put(self, block: int, latents: Tensor) -> Iterator[tuple[int, Frames]]:
        """Decode a block's latents [1, f, C, h, w]; yields (block, frames uint8 [F, H, W, 3]) of finished blocks."""
        start = time.perf_counter()
        with span("decode", block):
            submitted = self.decoder.submit(latents) if self.asynchronous else _Finished(self.decoder.decode(latents))
        self.seconds += time.perf_counter() - start
        before, self._pending = self._pending, (block, submitted)  # before the yield: the state may be saved there
        if before is not None:
            yield self._finish(*before)
        if not self.asynchronous:
            yield from self.flush()

    def flush(self) -> Iterator[tuple[int, Frames]]:
        """Yield the block that :meth:`put` has not yielded yet."""
        if self._pending is not None:
            before, self._pending = self._pending, None
            yield self._finish(*before)

    def _finish(self, block: int, pending: Any) -> tuple[int, Frames]:
        start = time.perf_counter()
        frames = pending.result()
        self.seconds += time.perf_counter() - start
        return block, frames

    @property
    def stateful(self) -> object:
        """The object whose state a session saves: this one, or the decoder if that has no state."""
        return self if hasattr(self.decoder, "state_dict") else self.decoder

    def state_dict(self) -> dict[str, Any]:
        """State of the decoder, and the frames not yielded yet."""
        state = dict(self.decoder.state_dict())
        if self._pending is not None:
            state |= {_PENDING: torch.from_numpy(self._pending[1].result()), _BLOCK: self._pending[0]}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.decoder.load_state_dict({name: x for name, x in state.items() if name not in (_PENDING, _BLOCK)})
        self._pending = None
        if _PENDING in state:
            self._pending = (int(state[_BLOCK]), _Finished(state[_PENDING].numpy()))


class _Finished:
    def __init__(self, frames: Frames) -> None:
        self.frames = frames

    def result(self) -> Frames:
        return self.frames
