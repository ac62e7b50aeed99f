"""A model that turns prompts into video: transformer, rollout configuration, text encoder, decoder and encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..common.checks import MOST_SIDE, dtype_name, whole
from ..common.settings import own_settings
from ..config import RolloutConfig
from ..io.files import check_text
from ..io.video import Frames, check_fps
from ..toy.world import WorldConfig
from .lora import AppliedLora
from .low_rank import Adapter, Adapters
from .transformer import HiARTransformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Decoder(Protocol):
    """Latents to pixels for one video; may carry state from block to block."""

    def decode(self, latents: Tensor) -> Frames:
        """latents [1, f, C, h, w], any device and dtype -> uint8 [F, H, W, 3]."""


class Encoder(Protocol):
    """Pixels to latents for one clip."""

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [1, F, 3, H, W] in [-1, 1] -> latents [1, f, C, h, w]."""


@dataclass(frozen=True, eq=False)
class VideoModel:
    """Everything that turns a prompt into video. :func:`.load_video_model` makes one.

    Attributes:
        name: as passed to the loader.
        transformer: the network, in eval mode; with ``experts`` one of them.
        rollout: the configuration that it was trained for, and the default of a video.
        fps, num_frames: defaults of a video; num_frames counts pixel frames.
        train_frames: pixel frames of its training clips.
        latent_size: (channels, height, width) of a latent frame.
        weights_sha256: hexadecimal, of the weights file (toy), the tensors (Wan), or the files' names, sizes and times
            (experts).
        text_encoder: prompt -> [1, L, text_dim]; ValueError of one line for a prompt that the model cannot show.
        new_decoder, new_encoder: make the decoder of a video, the encoder of a clip to continue.
        decoded_by: what decodes: "vae" ("full" or "small"), "file" and its "sha256"; None: a toy's codec.
        world: the world of a toy model; else None.
        temporal_compression: pixel frames per latent frame, except for the first latent frame: one.
        spatial_compression: pixels per latent along each axis.
        size_step: (height, width), of which a frame's size must be multiples, in pixels; None: one size only.
        experts: a network for each step, None at steps of other ranks; None: ``transformer`` at every step.
        merged_loras: adapters that the weights contain. adapters: those beside the weights, whose scales can change.
        options: command-line options that load the same model, beside name, device and dtype.

    Raises:
        ValueError: a count below 1, an illegal ``fps``, frames that are no whole number of blocks.
    """

    name: str
    transformer: HiARTransformer
    rollout: RolloutConfig
    fps: float
    num_frames: int
    train_frames: int
    latent_size: tuple[int, int, int]
    weights_sha256: str
    text_encoder: Callable[[str], Tensor]
    new_decoder: Callable[[], Decoder]
    new_encoder: Callable[[], Encoder] | None = None
    decoded_by: Mapping[str, str] | None = None
    world: WorldConfig | None = None
    temporal_compression: int = 1
    spatial_compression: int = 1
    size_step: tuple[int, int] | None = None
    experts: tuple[HiARTransformer | None, ...] | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    merged_loras: tuple[AppliedLora, ...] = ()
    adapters: Adapters | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "train_frames", "temporal_compression", "spatial_compression"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        object.__setattr__(self, "fps", check_fps(self.fps))
        self.latent_frames(self.num_frames)
        self.latent_frames(self.train_frames)

    def __repr__(self) -> str:
        height, width = self.pixel_size
        numbers = f"{dtype_name(self.dtype)} on {self.device}"
        return f"VideoModel({self.name!r}, frames of {width}x{height} pixels, {numbers})"

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.transformer.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.transformer.patch_embedding.weight.dtype

    @property
    def pixel_size(self) -> tuple[int, int]:
        """(height, width) of a frame."""
        _, height, width = self.latent_size
        return height * self.spatial_compression, width * self.spatial_compression

    @property
    def loras(self) -> tuple[AppliedLora, ...]:
        """All adapters of the transformer, with their scales."""
        return self.merged_loras + (() if self.adapters is None else self.adapters.applied)

    def with_adapters(self, adapters: Sequence[Adapter]) -> VideoModel:
        """The same model with these adapters beside its weights, in place of those there; the weights are shared."""
        base = self.adapters.base if self.adapters is not None else self.experts or (self.transformer,)
        new = Adapters(base, adapters)
        first = next(filter(None, new.transformers))
        return replace(
            self, transformer=first, experts=None if self.experts is None else new.transformers, adapters=new
        )

    def networks(self, steps: int) -> HiARTransformer | list[HiARTransformer | None]:
        """The network, or one for each step, with adapters at the scales that are wanted now; ValueError unless there
        are as many experts as steps.
        """
        if self.adapters is not None:
            self.adapters.write()
        if self.experts is None:
            return self.transformer
        if len(self.experts) != steps:
            raise ValueError(
                f"model {self.name} has weights for each of {len(self.experts)} steps, not for {steps} steps"
            )
        return list(self.experts)

    def sized(self, height: int | None = None, width: int | None = None) -> VideoModel:
        """The same model for frames of another size, in pixels; None: unchanged.

        Raises:
            ValueError: a size that the model cannot generate; names the legal ones.
        """
        own = self.pixel_size
        requested = (
            own[0] if height is None else whole("height", height, 1, most=MOST_SIDE),
            own[1] if width is None else whole("width", width, 1, most=MOST_SIDE),
        )
        if requested == own:
            return self
        if self.size_step is None:
            raise ValueError(
                f"model {self.name} makes frames of {own[0]}x{own[1]} pixels only, got {requested[0]}x{requested[1]}"
            )
        for name, value, step in zip(("height", "width"), requested, self.size_step, strict=True):
            if value % step:
                near = " or ".join(str(n) for n in (value // step * step, value // step * step + step) if n)
                raise ValueError(f"{name} must be a multiple of {step} pixels, got {value}, nearest {near}")
        cell = self.spatial_compression
        return replace(self, latent_size=(self.latent_size[0], requested[0] // cell, requested[1] // cell))

    @own_settings()
    def encode_text(self, prompt: str) -> Tensor:
        """The embedding of a prompt, [1, L, text_dim], in the transformer's dtype and on its device.

        Raises:
            ValueError: one line: no string, not UTF-8, a prompt that the model cannot show.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is a string, got {type(prompt).__name__}")
        check_text(prompt, "the prompt")
        prompt_embeds = self.text_encoder(prompt)
        if (width := prompt_embeds.shape[-1]) != (expected := self.transformer.config.text_dim):
            raise ValueError(f"embeddings of the text encoder have width {width}, the transformer takes {expected}")
        return prompt_embeds.to(self.device, self.dtype)

    @own_settings()
    def decoder(self) -> Decoder:
        """A new decoder, for one video."""
        return self.new_decoder()

    @own_settings()
    def encoder(self) -> Encoder:
        """A new encoder, for one clip; ValueError if the model has none."""
        if self.new_encoder is None:
            raise ValueError(f"model {self.name} has no encoder: it cannot continue an image or a clip")
        return self.new_encoder()

    def latent_frames(self, num_frames: int, conditioning_frames: int = 0) -> int:
        """Pixel frames -> latent frames.

        Args:
            conditioning_frames: latent frames of the image or clip that is continued; whole blocks follow it.

        Raises:
            ValueError: another number; names the nearest legal ones.
        """
        num_frames, block = whole("num_frames", num_frames, 1), self.rollout.frames_per_block
        latent, rest = divmod(num_frames - 1, self.temporal_compression)
        blocks, more = divmod(latent + 1 - conditioning_frames, block)
        if rest == 0 and more == 0 and blocks > 0:
            return latent + 1
        near = [self.pixel_frames(conditioning_frames + n * block) for n in (blocks, blocks + 1) if n > 0]
        near = near or [self.pixel_frames(conditioning_frames + block)]
        ahead = self.pixel_frames(conditioning_frames)
        behind = f", behind {ahead} conditioning frame{'s' * (ahead > 1)}" if conditioning_frames else ""
        raise ValueError(
            f"num_frames must fill whole blocks of {block} latent frames{behind}: "
            f"got {num_frames}, nearest {' or '.join(map(str, near))}"
        )

    def pixel_frames(self, latent_frames: int) -> int:
        """The number of pixel frames of a video's first ``latent_frames``."""
        return 1 + (latent_frames - 1) * self.temporal_compression if latent_frames else 0


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """A device by name; "auto": the first CUDA device, else the CPU. ValueError of one line if it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {name!r}; legal: auto, cpu, cuda, cuda:0, ...") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(name)!r} is not supported; legal: auto, cpu, cuda, cuda:0, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(name)!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def pick_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by name; None stays None."""
    if name is None or name in DTYPES.values():
        return name  # type: ignore[return-value]
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {str(name)!r}; legal: {', '.join(DTYPES)}")
    return DTYPES[str(name)]
