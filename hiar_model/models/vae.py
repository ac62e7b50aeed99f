"""Wan's VAE, streamed: diffusers' AutoencoderKLWan with its causal feature cache carried from call to call.

A clip is decoded or encoded in pieces of any length, with the same result as at once: the first latent frame is one
pixel frame, every other one four. Latents are normalised by the VAE's published means and standard deviations.

``own_stream=True`` puts the decoder on its own CUDA stream, so that a block is decoded while the transformer works on
the next one: call :meth:`StreamingDecoder.submit`, or let :func:`decode_behind` do it. In a pipeline,
``ExecutionConfig(dedicated_decoder_rank=True)`` leaves the decoding to a rank of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.checks import whole
from ..common.settings import own_settings
from .vae_fused import Cache
from .vae_weights import library, load_vae

if TYPE_CHECKING:
    from ..io.video import Frames

__all__ = ["PendingFrames", "StreamingDecoder", "StreamingEncoder", "decode_behind", "load_vae", "to_pixels"]

_UPSAMPLED_FROM_ZEROS = "Rep"  # diffusers' cache entry of a temporal upsampling after the first frame


class _Stream:
    """One clip going through the encoder or the decoder."""

    _features_shape = "[B, {}, f, h, w]"  # of what the cache holds, by its channels

    def __init__(self, vae: Any, half: str) -> None:
        if vae.use_tiling:
            raise ValueError("a VAE with tiling on takes whole clips only: vae.disable_tiling(), or use diffusers' own")
        self.vae, self.coder, self.frames_done = vae, getattr(vae, half), 0
        self._channels = self._cached_channels()
        self._cache: Cache = [None] * len(self._channels)
        weight = next(vae.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        shape = (1, 1, vae.config.z_dim, 1, 1)
        self.mean, self.std = (
            torch.tensor(getattr(vae.config, name), dtype=torch.float32, device=self.device).view(shape)
            for name in ("latents_mean", "latents_std")
        )

    def _cached_channels(self) -> list[int]:
        """Channels of each entry of the cache: the inputs of the convolutions in time."""
        convs = [m for name, m in self.coder.named_modules() if isinstance(m, nn.Conv3d) and "shortcut" not in name]
        return [conv.in_channels for conv in convs]

    def reset(self) -> None:
        """Start another clip."""
        self.frames_done, self._cache = 0, [None] * len(self._cache)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything needed to continue: ``frames_done``, and ``features.N`` of each convolution.

        All are tensors, for safetensors: an empty one stands for diffusers' "Rep" entry.
        """
        state = {"frames_done": torch.tensor(self.frames_done)}
        for i, features in enumerate(self._cache):
            if features is not None and self.frames_done:
                state[f"features.{i}"] = torch.empty(0) if isinstance(features, str) else features.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the :meth:`state_dict` of a stream through the same VAE.

        Raises:
            ValueError: the state is of another VAE, or in another dtype: names the tensor.
        """
        expected_names = ["frames_done"]
        if "frames_done" in state and int(state["frames_done"]) > 0:
            expected_names += [f"features.{i}" for i in range(len(self._cache))]
        for name in [*expected_names, *state]:
            if name not in state or name not in expected_names:
                what = "is missing" if name not in state else "is unexpected"
                legal = f"frames_done and, once that is above 0, features.0 to features.{len(self._cache) - 1}"
                raise ValueError(f"VAE state: {name} {what}; legal: {legal}")
        cache: Cache = [None] * len(self._cache)
        for i, name in enumerate(expected_names[1:]):
            x, channels = state[name], self._channels[i]
            expected = self._features_shape.format(channels)
            dims = expected.count(",") + 1
            if x.numel() and (x.dim() != dims or x.shape[1] != channels or x.dtype != self.dtype):
                expected = f"{expected} {self.dtype}"
                raise ValueError(f"VAE state: {name} is {list(x.shape)} {x.dtype}, expected {expected}")
            cache[i] = x.to(self.device, copy=True) if x.numel() else _UPSAMPLED_FROM_ZEROS
        self.frames_done, self._cache = int(state["frames_done"]), cache

    def _through(self, x: Tensor, **options: Any) -> Tensor:
        return self.coder(x, feat_cache=self._cache, feat_idx=[0], **options)

    def _check_size(self, x: Tensor, name: str) -> None:
        """Refuse a piece of another size than the first, whose size the first convolution's cache has."""
        first = self._cache[0] if self.frames_done else None
        if first is not None and (x.shape[0], *x.shape[-2:]) != (first.shape[0], *first.shape[-2:]):
            expected, actual = ([s[0], *s[-2:]] for s in (first.shape, x.shape))
            raise ValueError(
                f"{name} of a clip that began with batch, height, width {expected} have {actual}: reset() it"
            )


@dataclass(frozen=True)
class PendingFrames:
    """Decoded frames that are being copied to the host."""

    frames: Tensor
    done: Any = None  # a CUDA event

    def result(self) -> Frames:
        """uint8 [F, H, W, 3]; waits for the copy."""
        if self.done is not None:
            self.done.synchronize()
        return self.frames.numpy()


class StreamingDecoder(_Stream):
    """Latents to pixels for one video, block by block, with the same result as decoding all at once.

    Args:
        vae: of :func:`load_vae`, or diffusers' own; several decoders may share one.
        frames_at_once: latent frames per call of the network (the first of a clip is always alone). More need fewer
            launches and fewer copies of cached frames, and proportionally more memory; equal up to rounding.
        own_stream: run on its own CUDA stream; ignored without CUDA.

    Raises:
        ValueError: frames_at_once below 1, or a VAE with tiling on.
    """

    def __init__(self, vae: Any, *, frames_at_once: int = 1, own_stream: bool = False) -> None:
        super().__init__(vae, "decoder")
        self.frames_at_once = whole("frames_at_once", frames_at_once, 1)
        self.stream = torch.cuda.Stream(self.device) if own_stream and self.device.type == "cuda" else None

    def decode(self, latents: Tensor) -> Frames:
        """Normalised latents [1, f, C, h, w], any device and dtype -> uint8 [F, H, W, 3].

        Raises:
            ValueError: latents of another shape, or of another size than the previous ones.
        """
        return self.submit(latents).result()

    @own_settings()
    def submit(self, latents: Tensor) -> PendingFrames:
        """:meth:`decode` without waiting: on CUDA the work is queued and the host continues."""
        if latents.dim() != 5 or latents.shape[0] != 1:
            raise ValueError(f"latents must be [1, f, {self.vae.config.z_dim}, h, w], got {list(latents.shape)}")
        x = self._features(latents)
        with self._beside(x), torch.no_grad():
            pixels = self._decode(x)[0].float()
            frames = ((pixels + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).contiguous()
            if self.device.type != "cuda":
                return PendingFrames(frames)
            host = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=True).copy_(frames, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return PendingFrames(host, done)

    @own_settings()
    def decode_float(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, f, C, h, w] -> pixels [B, F, 3, H, W] in [-1, 1], dtype and device of the VAE."""
        x = self._features(latents)
        with self._beside(x), torch.no_grad():
            pixels = self._decode(x)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            pixels.record_stream(torch.cuda.current_stream(self.device))
        return pixels

    def state_dict(self) -> dict[str, Tensor]:
        if self.stream is not None:
            self.stream.synchronize()
        return super().state_dict()

    def _features(self, latents: Tensor) -> Tensor:
        """Denormalised latents [B, C, f, h, w]: a copy, so that the caller may overwrite the latents meanwhile."""
        channels = self.vae.config.z_dim
        if latents.dim() != 5 or latents.shape[2] != channels or 0 in latents.shape:
            raise ValueError(f"latents must be [B, f >= 1, {channels}, h, w], got {list(latents.shape)}")
        x = latents.detach().to(self.device, torch.float32) * self.std + self.mean
        self._check_size(x, "latents")
        return x.to(self.dtype).transpose(1, 2)

    @contextmanager
    def _beside(self, x: Tensor) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        x.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield

    def _decode(self, x: Tensor) -> Tensor:
        x, pieces, start = self.vae.post_quant_conv(x), [], 0
        while start < x.shape[2]:
            first = self.frames_done == 0
            piece = x[:, :, start : start + (1 if first else self.frames_at_once)]
            pieces.append(self._through(piece, first_chunk=first))
            start, self.frames_done = start + piece.shape[2], self.frames_done + piece.shape[2]
        pixels = torch.cat(pieces, 2)
        if self.vae.config.patch_size is not None:
            pixels = library("models.autoencoders.autoencoder_kl_wan").unpatchify(pixels, self.vae.config.patch_size)
        return pixels.clamp(-1, 1).transpose(1, 2)


def decode_behind(decoder: StreamingDecoder, blocks: Iterable[Tensor]) -> Iterator[Frames]:
    """Decode each block [1, f, C, h, w] while the next is generated; with ``own_stream`` they run in parallel."""
    pending = None
    for latents in blocks:
        following = decoder.submit(latents)
        if pending is not None:
            yield pending.result()
        pending = following
    if pending is not None:
        yield pending.result()


class StreamingEncoder(_Stream):
    """Pixels to normalised latents for one clip: 1 + 4n frames at first (n >= 0), 4n in every later call.

    An image is a clip of one frame. Other lengths are errors; diffusers' own ``encode`` silently drops the frames
    behind the last 4n + 1. Latents are the means of the predicted distribution, not samples.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__(vae, "encoder")

    @own_settings()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, F, 3, H, W] in [-1, 1] (see :func:`to_pixels`) -> latents [B, f, C, h, w], float32.

        Raises:
            ValueError: frames that fill no latent frame, or a size that fills no latent, with the nearest legal ones.
        """
        config = self.vae.config
        colours, step, cell = 3, config.scale_factor_temporal, config.scale_factor_spatial
        if pixels.dim() != 5 or pixels.shape[2] != colours or 0 in pixels.shape:
            raise ValueError(f"pixels must be [B, F >= 1, 3, H, W], got {list(pixels.shape)}")
        frames, *size = pixels.shape[1], *pixels.shape[3:]
        if size[0] % cell or size[1] % cell:
            raise ValueError(f"height and width must be multiples of {cell} pixels, got {size[0]}x{size[1]}")
        ahead = 1 if self.frames_done == 0 else 0
        if (frames - ahead) % step or frames < ahead:
            below = ahead + (frames - ahead) // step * step
            near = " or ".join(str(n) for n in (below, below + step) if n > 0)
            raise ValueError(f"a clip must have 1 + {step}n frames, later pieces {step}n: got {frames}, nearest {near}")
        x = pixels.detach().to(self.device, self.dtype).transpose(1, 2)
        if config.patch_size is not None:
            x = library("models.autoencoders.autoencoder_kl_wan").patchify(x.contiguous(), config.patch_size)
        self._check_size(x, "frames")
        pieces = []
        with torch.no_grad():
            for piece in x.split([ahead] * ahead + [step] * ((frames - ahead) // step), dim=2):
                pieces.append(self._through(piece))
                self.frames_done += piece.shape[2]
            mean = self.vae.quant_conv(torch.cat(pieces, 2)).chunk(2, dim=1)[0]
        return (mean.transpose(1, 2).float() - self.mean) / self.std


def to_pixels(frames: Frames) -> Tensor:
    """uint8 [F, H, W, 3] -> float32 [1, F, 3, H, W] in [-1, 1], the input of :meth:`StreamingEncoder.encode`."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype.name != "uint8":
        raise ValueError(f"frames must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    return torch.from_numpy(frames.copy()).movedim(-1, 1)[None].float() / 127.5 - 1
