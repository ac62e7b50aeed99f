"""Clips through the small autoencoder, in pieces: :class:`SmallDecoder`, :class:`SmallEncoder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.cuda_graph import CudaGraphs
from ..common.settings import own_settings
from .small_vae import CELL, CHANNELS, STEP, SmallVAE, memory_sizes, through
from .vae import StreamingDecoder

Capture = Callable[[Callable[[], Any]], Any]
"""Runs a function once, and returns what repeats it with ``replay()``: see :mod:`hiar_model.common.cuda_graph`."""
_BEFORE_THE_FIRST = STEP - 1  # raw frames before the first pixel frame, which are dropped


class SmallDecoder(StreamingDecoder):
    """:class:`.vae.StreamingDecoder` of a small autoencoder: the same methods, shapes and frame counts.

    Args:
        vae: of :func:`.small_vae.load_small_vae`; several decoders may share one.
        frames_at_once: latent frames per call of the network: more need fewer launches and more memory.
        own_stream: run on its own CUDA stream; ignored without CUDA.
        cuda_graph: capture a call of the network at its first use and replay it afterwards; None: on CUDA.
        capture: in place of CUDA's, for tests.

    Raises:
        ValueError: frames_at_once below 1, or cuda_graph=True without CUDA.
    """

    _features_shape = "[B, {}, h, w]"

    def __init__(
        self,
        vae: SmallVAE,
        *,
        frames_at_once: int = 1,
        own_stream: bool = False,
        cuda_graph: bool | None = None,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(vae, frames_at_once=frames_at_once, own_stream=own_stream)
        on_cuda = self.device.type == "cuda"
        if capture is None and (on_cuda if cuda_graph is None else cuda_graph):
            capture = CudaGraphs(self.device)
        self._capture = capture
        self._calls: dict[int, tuple[Tensor, Tensor, Any]] = {}  # by latent frames: input, output, captured call

    def _cached_channels(self) -> list[int]:
        return [channels for channels, *_ in memory_sizes(self.coder, 1, 1)]

    def reset(self) -> None:
        """Start another clip, of any size."""
        self.frames_done = 0  # the memory is cleared in _begin, on the decoder's own stream

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._calls.clear()  # captured with the addresses of the memory before

    def _decode(self, x: Tensor) -> Tensor:
        x, pieces = x.transpose(1, 2), []
        if self.frames_done == 0:
            self._begin(x)
        for piece in x.split(self.frames_at_once, 1):
            raw = self._call(piece)[:, _BEFORE_THE_FIRST if self.frames_done == 0 else 0 :]
            pieces.append(raw.clamp(0, 1))  # a copy: the next call overwrites the output of a captured one
            self.frames_done += piece.shape[1]
        return torch.cat(pieces, 1).mul_(2).sub_(1)

    def _begin(self, x: Tensor) -> None:
        """Clear the memory; with captured calls it stays where it is."""
        shapes = [(x.shape[0], *size) for size in memory_sizes(self.coder, *x.shape[-2:])]
        if self._cache[0] is not None and self._cache[0].shape == shapes[0]:
            for memory in self._cache:
                memory.zero_()
        else:
            self._cache = [torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes]
            self._calls.clear()

    def _call(self, piece: Tensor) -> Tensor:
        """Raw frames [B, 4f, 3, H, W] of latents [B, f, C, h, w]."""
        if self._capture is None:
            return through(self.coder, piece, self._cache)
        batch, frames, _, height, width = piece.shape
        if frames in self._calls:
            latents, raw, call = self._calls[frames]
            latents.copy_(piece)
            call.replay()
            return raw
        latents = piece.clone()
        raw = latents.new_empty(batch, STEP * frames, 3, CELL * height, CELL * width)
        call = self._capture(lambda: raw.copy_(through(self.coder, latents, self._cache)))  # and runs it, once
        self._calls[frames] = latents, raw, call
        return raw


class SmallEncoder:
    """Pixels to normalised latents by a small autoencoder.

    A latent frame is made of four pixel frames; where a clip ends within four, its last frame is repeated, as published
    (an image: four times). A clip of 1 + 4n frames has 1 + n latent frames, as with Wan's own VAE.
    """

    def __init__(self, vae: SmallVAE) -> None:
        self.vae, weight = vae, next(vae.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.reset()

    def reset(self) -> None:
        """Start another clip."""
        self._memory: list[Tensor] = []
        self._waiting: Tensor | None = None  # frames that fill no latent frame yet

    @own_settings()
    def encode(self, pixels: Tensor, *, more: bool = False) -> Tensor:
        """Pixels [B, F, 3, H, W] in [-1, 1] (see :func:`.vae.to_pixels`) -> latents [B, f, 16, h, w], float32.

        Args:
            more: the clip goes on: frames that fill no latent frame wait for the next call. Otherwise it ends here, and
                the next call is another clip.

        Raises:
            ValueError: pixels of another shape, of a size that fills no latent, or of another size than before.
        """
        if pixels.dim() != 5 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"pixels must be [B, F >= 1, 3, H, W], got {list(pixels.shape)}")
        batch, _, _, height, width = pixels.shape
        if height % CELL or width % CELL:
            raise ValueError(f"height and width must be multiples of {CELL} pixels, got {height}x{width}")
        x = pixels.detach().to(self.device, torch.float32).add(1).div_(2).to(self.dtype)
        sizes = [(batch, *size) for size in memory_sizes(self.vae.encoder, height, width)]
        if not self._memory:
            self._memory = [torch.zeros(size, dtype=self.dtype, device=self.device) for size in sizes]
        elif self._memory[0].shape != sizes[0]:
            before = self._memory[0].shape
            raise ValueError(
                f"frames of a clip that began with batch, height, width {[before[0], 2 * before[2], 2 * before[3]]} "
                f"have {[batch, height, width]}: reset() it"
            )
        if self._waiting is not None:
            x = torch.cat([self._waiting, x], 1)
        rest = x.shape[1] % STEP
        if more:
            x, self._waiting = x.tensor_split([x.shape[1] - rest], 1)
        elif rest:
            x = torch.cat([x, x[:, -1:].expand(-1, STEP - rest, -1, -1, -1)], 1)
        empty = x.new_empty(batch, 0, CHANNELS, height // CELL, width // CELL)
        with torch.no_grad():
            pieces = [through(self.vae.encoder, piece, self._memory) for piece in x.split(STEP, 1) if piece.shape[1]]
        if not more:
            self.reset()
        return torch.cat([empty, *pieces], 1).float()
