"""A model ready to make video: transformer, schedule, text encoder and decoder under one name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..common.checks import CACHE_SOURCES, ORDERS, whole
from ..common.settings import own_settings
from ..io.files import check_text
from ..io.video import Frames, check_fps
from ..toy.world import WorldConfig
from .flow_schedule import FlowSchedule
from .kv_cache import E4M3
from .transformer import HiARTransformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
CACHE_DTYPES = {**DTYPES, "float8_e4m3fn": E4M3}


class Decoder(Protocol):
    """Latents to pixels for one video; keeps what it needs between successive blocks."""

    def decode(self, latents: Tensor) -> Frames:
        """latents [1, f, C, h, w], any device and dtype -> uint8 [F, H, W, 3]."""


class Encoder(Protocol):
    """Pixels to latents for one clip."""

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [1, F, 3, H, W] in [-1, 1] -> latents [1, f, C, h, w]."""


@dataclass(frozen=True, eq=False)
class VideoModel:
    """Everything that turns a prompt into video.

    name               as it was asked for
    transformer        the network, in evaluation mode; with ``experts`` one of them
    schedule           noise levels of its steps
    frames_per_block   latent frames made at once
    window_frames      latent frames a block sees with its own, one number or one per step; None: all
    sink_frames        first latent frames that stay visible, inside the window's number
    fps, num_frames    of a video if nothing is said; num_frames counts pixel frames
    train_frames       pixel frames of the clips that it was trained on
    latent_size        (channels, height, width) of a latent frame
    weights_sha256     hexadecimal: of the weights file; of a Wan model, of its tensors; of experts, of their files'
                       names, sizes and times
    text_encoder       prompt -> [1, L, text_dim]; ValueError of one line for a prompt that the model cannot show
    new_decoder        makes the decoder of one video
    new_encoder        makes the encoder of one clip, to go on from
    world              what a toy model shows; None for others
    temporal_compression  pixel frames per latent frame, but the first latent frame is always one pixel frame
    spatial_compression   pixels of a latent along a side
    size_step          (rows, columns) of pixels that frames may be any multiples of; None: it makes one size
    cache_source       where the caches take their keys in the form that it was trained in: own or next_step
    order              the order that it was trained for; None: any of the matched graph, and block_first too
    experts            a network for each step, None at those of other ranks; None: ``transformer`` at every step
    options            of the command line that loads it so, beside its name, device and dtype
    """

    name: str
    transformer: HiARTransformer
    schedule: FlowSchedule
    frames_per_block: int
    window_frames: int | tuple[int | None, ...] | None
    sink_frames: int
    fps: float
    num_frames: int
    train_frames: int
    latent_size: tuple[int, int, int]
    weights_sha256: str
    text_encoder: Callable[[str], Tensor]
    new_decoder: Callable[[], Decoder]
    new_encoder: Callable[[], Encoder] | None = None
    world: WorldConfig | None = None
    temporal_compression: int = 1
    spatial_compression: int = 1
    size_step: tuple[int, int] | None = None
    cache_source: str = "own"
    order: str | None = None
    experts: tuple[HiARTransformer | None, ...] | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("frames_per_block", "num_frames", "train_frames", "temporal_compression", "spatial_compression"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        object.__setattr__(self, "sink_frames", whole("sink_frames", self.sink_frames, 0))
        if self.cache_source not in CACHE_SOURCES:
            raise ValueError(f"cache_source must be one of {', '.join(CACHE_SOURCES)}, got {self.cache_source!r}")
        if self.order not in (None, *ORDERS):
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, or null, got {self.order!r}")
        if self.cache_source == "next_step" and self.order not in ("stream", "wavefront"):
            raise ValueError(f'cache_source "next_step" needs the order stream or wavefront, got {self.order!r}')
        object.__setattr__(self, "fps", check_fps(self.fps))
        self.latent_frames(self.num_frames)
        self.latent_frames(self.train_frames)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.transformer.patch_embedding.weight.dtype

    @property
    def pixel_size(self) -> tuple[int, int]:
        """(height, width) of a frame."""
        _, height, width = self.latent_size
        return height * self.spatial_compression, width * self.spatial_compression

    def networks(self, steps: int) -> HiARTransformer | list[HiARTransformer | None]:
        """What a rollout of so many steps takes; ValueError if that is not how many experts there are."""
        if self.experts is None:
            return self.transformer
        if len(self.experts) != steps:
            raise ValueError(
                f"model {self.name} has weights for each of {len(self.experts)} steps, not for {steps} steps"
            )
        return list(self.experts)

    def sized(self, height: int | None = None, width: int | None = None) -> VideoModel:
        """The same model for frames of another size, in pixels; None: as it is.

        Raises:
            ValueError: a size that it does not make; names the legal ones.
        """
        own = self.pixel_size
        asked = (
            own[0] if height is None else whole("height", height, 1),
            own[1] if width is None else whole("width", width, 1),
        )
        if asked == own:
            return self
        if self.size_step is None:
            raise ValueError(
                f"model {self.name} makes frames of {own[0]}x{own[1]} pixels only, got {asked[0]}x{asked[1]}"
            )
        for name, value, step in zip(("height", "width"), asked, self.size_step, strict=True):
            if value % step:
                near = " or ".join(str(n) for n in (value // step * step, value // step * step + step) if n)
                raise ValueError(f"{name} must be a multiple of {step} pixels, got {value}, nearest {near}")
        cell = self.spatial_compression
        return replace(self, latent_size=(self.latent_size[0], asked[0] // cell, asked[1] // cell))

    @own_settings()
    def encode_text(self, prompt: str) -> Tensor:
        """The prompt as the transformer takes it, [1, L, text_dim] on its device; ValueError for an illegal prompt."""
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is a string, got {type(prompt).__name__}")
        check_text(prompt, "the prompt")
        found = self.text_encoder(prompt)
        if found.shape[-1] != (width := self.transformer.config.text_dim):
            made = found.shape[-1]
            raise ValueError(f"the text encoder makes {made} numbers of a token, the transformer takes {width}")
        return found.to(self.device, self.dtype)

    @own_settings()
    def decoder(self) -> Decoder:
        """A fresh decoder, for one video."""
        return self.new_decoder()

    @own_settings()
    def encoder(self) -> Encoder:
        """A fresh encoder, for one clip; ValueError if the model has none."""
        if self.new_encoder is None:
            raise ValueError(f"model {self.name} has no encoder: it cannot go on from an image or a clip")
        return self.new_encoder()

    def latent_frames(self, num_frames: int, given: int = 0) -> int:
        """Pixel frames -> latent frames, which must be the ``given`` ones and whole blocks behind them.

        Raises:
            ValueError: names the nearest legal numbers.
        """
        num_frames = whole("num_frames", num_frames, 1)
        latent, rest = divmod(num_frames - 1, self.temporal_compression)
        blocks, more = divmod(latent + 1 - given, self.frames_per_block)
        if rest == 0 and more == 0 and blocks > 0:
            return latent + 1
        near = [self.pixel_frames(given + n * self.frames_per_block) for n in (blocks, blocks + 1) if n > 0]
        near = near or [self.pixel_frames(given + self.frames_per_block)]
        ahead = self.pixel_frames(given)
        behind = f", behind {ahead} given frame{'s' * (ahead > 1)}" if given else ""
        raise ValueError(
            f"num_frames must fill whole blocks of {self.frames_per_block} latent frames{behind}: "
            f"got {num_frames}, nearest {' or '.join(map(str, near))}"
        )

    def pixel_frames(self, latent_frames: int) -> int:
        """How many pixel frames the first ``latent_frames`` of a video make."""
        return 1 + (latent_frames - 1) * self.temporal_compression if latent_frames else 0


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """ "auto" is the first CUDA device, else the CPU; ValueError of one line for what is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {name!r}; legal: auto, cpu, cuda, cuda:0, ...") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(name)!r} is not supported; legal: auto, cpu, cuda, cuda:0, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(name)!r} is not there: this torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def pick_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by name; None stays None."""
    if name is None or name in DTYPES.values():
        return name  # type: ignore[return-value]
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {str(name)!r}; legal: {', '.join(DTYPES)}")
    return DTYPES[str(name)]


def pick_cache_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype of keys and values by name; None stays None."""
    if name is None or name in CACHE_DTYPES.values():
        return name  # type: ignore[return-value]
    if name not in CACHE_DTYPES:
        raise ValueError(f"unknown cache-dtype {str(name)!r}; legal: {', '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES[str(name)]
