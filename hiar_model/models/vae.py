"""Wan's VAE, streamed: diffusers' AutoencoderKLWan with its causal feature cache carried from call to call.

A clip goes through in pieces of any length, and the pieces join without a seam: the first latent frame makes one pixel
frame, every other one four. :class:`StreamingDecoder` is a bundle's decoder; :class:`StreamingEncoder` makes latents of
an image or a clip to go on from. Latents are normalised by the VAE's published means and deviations.

Where it runs. ``own_stream=True`` puts the decoder on a CUDA stream of its own, so that a block is decoded while the
transformer works on the next one: hand blocks over with :meth:`StreamingDecoder.submit`, or let :func:`decode_behind`
do it. A rank of its own is the pipeline's business: with ``PipelineOptions(decode_apart=True)`` the last rank has no
steps and gets finished blocks, which it decodes as any process does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.checks import whole
from .vae_fused import Cache
from .vae_weights import library, load_vae

if TYPE_CHECKING:
    from ..io.video import Frames

__all__ = ["Pending", "StreamingDecoder", "StreamingEncoder", "decode_behind", "load_vae", "to_pixels"]

_UPSAMPLED_FROM_ZEROS = "Rep"  # what diffusers keeps for a temporal upsampling that has seen the first frame alone


class _Stream:
    """One clip on its way through one half of the VAE."""

    def __init__(self, vae: Any, half: str) -> None:
        if vae.use_tiling:
            raise ValueError("a VAE with tiling on takes whole clips only: vae.disable_tiling(), or use diffusers' own")
        self.vae, self.coder, self.frames_done = vae, getattr(vae, half), 0
        convs = [m for name, m in self.coder.named_modules() if isinstance(m, nn.Conv3d) and "shortcut" not in name]
        self._channels = [conv.in_channels for conv in convs]
        self._cache: Cache = [None] * len(convs)
        weight = vae.post_quant_conv.weight
        self.device, self.dtype = weight.device, weight.dtype
        shape = (1, 1, vae.config.z_dim, 1, 1)
        self.mean, self.std = (
            torch.tensor(vae.config[name], dtype=torch.float32, device=self.device).view(shape)
            for name in ("latents_mean", "latents_std")
        )

    def reset(self) -> None:
        """Begin another clip."""
        self.frames_done, self._cache = 0, [None] * len(self._cache)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is needed to go on, as copies: ``frames_done`` and ``features.N`` of each convolution.

        Tensors alone, as safetensors takes them: an empty one stands for diffusers' mark of a temporal upsampling that
        has seen the first frame only.
        """
        state = {"frames_done": torch.tensor(self.frames_done)}
        for i, kept in enumerate(self._cache):
            if kept is not None:
                state[f"features.{i}"] = torch.empty(0) if isinstance(kept, str) else kept.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict` of a stream through the same VAE.

        Raises:
            ValueError: the state is of another VAE, or in another dtype: names the tensor.
        """
        wanted = ["frames_done"]
        if "frames_done" in state and int(state["frames_done"]) > 0:
            wanted += [f"features.{i}" for i in range(len(self._cache))]
        for name in [*wanted, *state]:
            if name not in state or name not in wanted:
                what = "is missing" if name not in state else "is unexpected"
                legal = f"frames_done and, once that is above 0, features.0 to features.{len(self._cache) - 1}"
                raise ValueError(f"state of a VAE: {name} {what}; legal: {legal}")
        cache: Cache = [None] * len(self._cache)
        for i, name in enumerate(wanted[1:]):
            kept = state[name]
            if kept.numel() and (kept.dim() != 5 or kept.shape[1] != self._channels[i] or kept.dtype != self.dtype):
                expected = f"[B, {self._channels[i]}, f, h, w] {self.dtype}"
                raise ValueError(f"state of a VAE: {name} is {list(kept.shape)} {kept.dtype}, expected {expected}")
            cache[i] = kept.to(self.device, copy=True) if kept.numel() else _UPSAMPLED_FROM_ZEROS
        self.frames_done, self._cache = int(state["frames_done"]), cache

    def _through(self, x: Tensor, **options: Any) -> Tensor:
        return self.coder(x, feat_cache=self._cache, feat_idx=[0], **options)

    def _check_size(self, x: Tensor, name: str) -> None:
        """Later pieces are as large as the first: the cache of the first convolution has its input's size."""
        first = self._cache[0]
        if first is not None and (x.shape[0], *x.shape[3:]) != (first.shape[0], *first.shape[3:]):
            began, found = ([s[0], *s[-2:]] for s in (first.shape, x.shape))
            raise ValueError(f"{name} of a clip that began with batch, height, width {began} have {found}: reset() it")


@dataclass(frozen=True)
class Pending:
    """Frames on their way to the host."""

    frames: Tensor
    done: Any = None  # a CUDA event

    def result(self) -> Frames:
        """uint8 [F, H, W, 3]; waits for them."""
        if self.done is not None:
            self.done.synchronize()
        return self.frames.numpy()


class StreamingDecoder(_Stream):
    """Latents to pixels for one video, block by block as if all were decoded at once.

    Args:
        vae: of :func:`load_vae`, or diffusers' own; many decoders may share one.
        frames_at_once: latent frames that go through together (the first one of a clip always alone): more of them
            are fewer launches and less copying of cached frames, for memory in proportion. The result is the same up
            to rounding.
        own_stream: work on a CUDA stream of its own; without CUDA it does nothing.

    Raises:
        ValueError: a number that is not legal, or a VAE with tiling on.
    """

    def __init__(self, vae: Any, *, frames_at_once: int = 1, own_stream: bool = False) -> None:
        super().__init__(vae, "decoder")
        self.frames_at_once = whole("frames_at_once", frames_at_once, 1)
        self.stream = torch.cuda.Stream(self.device) if own_stream and self.device.type == "cuda" else None

    def decode(self, latents: Tensor) -> Frames:
        """Normalised latents [1, f, C, h, w], any device and dtype -> uint8 [F, H, W, 3].

        Raises:
            ValueError: latents of another shape, or of another size than those before.
        """
        return self.submit(latents).result()

    def submit(self, latents: Tensor) -> Pending:
        """:meth:`decode` that does not wait: work is queued, on CUDA, and the host goes on."""
        if latents.dim() != 5 or latents.shape[0] != 1:
            raise ValueError(f"latents must be [1, f, {self.vae.config.z_dim}, h, w], got {list(latents.shape)}")
        x = self._features(latents)
        with self._beside(x), torch.no_grad():
            pixels = self._decode(x)[0].float()
            frames = ((pixels + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).contiguous()
            if self.device.type != "cuda":
                return Pending(frames)
            host = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=True).copy_(frames, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return Pending(host, done)

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
        """Denormalised, [B, C, f, h, w]; a copy, so that the latents may change while a stream of its own works."""
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
        x, made, start = self.vae.post_quant_conv(x), [], 0
        while start < x.shape[2]:
            first = self.frames_done == 0
            piece = x[:, :, start : start + (1 if first else self.frames_at_once)]
            made.append(self._through(piece, first_chunk=first))
            start, self.frames_done = start + piece.shape[2], self.frames_done + piece.shape[2]
        pixels = torch.cat(made, 2)
        if self.vae.config.patch_size is not None:
            pixels = library("models.autoencoders.autoencoder_kl_wan").unpatchify(pixels, self.vae.config.patch_size)
        return pixels.clamp(-1, 1).transpose(1, 2)


def decode_behind(decoder: StreamingDecoder, blocks: Iterable[Tensor]) -> Iterator[Frames]:
    """Frames of each block [1, f, C, h, w], while the next block is being made: with ``own_stream`` beside it."""
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

    An image is a clip of one frame. Other lengths are refused: diffusers' own ``encode`` drops the frames behind the
    last 4n + 1 in silence, and its tiling leaves Wan 2.2's VAE untiled at 320 pixels (0.42.1). Latents are the means
    of what the VAE predicts: nothing is drawn.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__(vae, "encoder")

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
        made = []
        with torch.no_grad():
            for piece in x.split([ahead] * ahead + [step] * ((frames - ahead) // step), dim=2):
                made.append(self._through(piece))
                self.frames_done += piece.shape[2]
            mean = self.vae.quant_conv(torch.cat(made, 2)).chunk(2, dim=1)[0]
        return (mean.transpose(1, 2).float() - self.mean) / self.std


def to_pixels(frames: Frames) -> Tensor:
    """uint8 [F, H, W, 3] -> [1, F, 3, H, W] float32 in [-1, 1], as encoders take them."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype.name != "uint8":
        raise ValueError(f"frames must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    return torch.from_numpy(frames.copy()).movedim(-1, 1)[None].float() / 127.5 - 1
