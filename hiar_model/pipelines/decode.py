"""Finished blocks to frames, in order, one behind where the decoder works beside the transformer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hiar_kernels.nvtx import span

from ..io.video import Frames
from ..models.video_model import Decoder

_WAITING, _BLOCK = "waiting", "waiting_block"


class Decoding:
    """A decoder at work on one video.

    One with a CUDA stream of its own decodes a block while the next one is made: frames come one block behind. Any
    other decodes at once.

    seconds: that :meth:`put` and :meth:`rest` waited for frames.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder: Any = decoder
        self.behind = getattr(decoder, "stream", None) is not None
        self.seconds = 0.0
        self._waiting: tuple[int, Any] | None = None

    def skip(self, latents: Tensor) -> None:
        """Frames that are known: the decoder learns what comes before the others."""
        with span("decode", "given"):
            self.decoder.decode(latents)

    def put(self, block: int, latents: Tensor) -> Iterator[tuple[int, Frames]]:
        """The next block's latents [1, f, C, h, w]; yields (block, frames uint8 [F, H, W, 3]) of what is done."""
        begun = time.perf_counter()
        with span("decode", block):
            following = self.decoder.submit(latents) if self.behind else _Done(self.decoder.decode(latents))
        self.seconds += time.perf_counter() - begun
        before, self._waiting = self._waiting, (block, following)  # at every yield the state is whole
        if before is not None:
            yield self._finish(*before)
        if not self.behind:
            yield from self.rest()

    def rest(self) -> Iterator[tuple[int, Frames]]:
        """What :meth:`put` has not yielded yet."""
        if self._waiting is not None:
            before, self._waiting = self._waiting, None
            yield self._finish(*before)

    def _finish(self, block: int, pending: Any) -> tuple[int, Frames]:
        begun = time.perf_counter()
        frames = pending.result()
        self.seconds += time.perf_counter() - begun
        return block, frames

    @property
    def kept(self) -> object:
        """What a session keeps: this, or the decoder if that has no state."""
        return self if hasattr(self.decoder, "state_dict") else self.decoder

    def state_dict(self) -> dict[str, Any]:
        """The decoder's, and frames that were decoded but not yielded."""
        state = dict(self.decoder.state_dict())
        if self._waiting is not None:
            state |= {_WAITING: torch.from_numpy(self._waiting[1].result()), _BLOCK: self._waiting[0]}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.decoder.load_state_dict({name: x for name, x in state.items() if name not in (_WAITING, _BLOCK)})
        self._waiting = None
        if _WAITING in state:
            self._waiting = (int(state[_BLOCK]), _Done(state[_WAITING].numpy()))


class _Done:
    def __init__(self, frames: Frames) -> None:
        self.frames = frames

    def result(self) -> Frames:
        return self.frames
