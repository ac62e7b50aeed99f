"""Sizes of the networks and of Wan 2.1's videos: the one table of these numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..common.checks import number_above_0, whole

_PRESETS: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
    "wan2.1-t2v-14b": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "toy": {
        "dim": 128, "ffn_dim": 512, "num_heads": 2, "num_layers": 6, "freq_dim": 64, "text_dim": 32, "text_len": 8,
        "position_grid": (4, 4),
    },
}  # fmt: skip
_PRESETS["scenes"] = _PRESETS["toy"]


@dataclass(frozen=True)
class WanVideo:
    """The videos that Wan 2.1 was trained on, and the defaults of its causal few-step models.

    Attributes:
        size, num_frames, fps: of a video: (height, width) in pixels, pixel frames, pixel frames per second.
        sizes: all that the training had; the 1.3B network only those of 480 pixels.
        frames_per_block, window_frames: latent frames generated at once, and seen by a block, its own included.
        temporal_compression: pixel frames per latent frame, except the first latent frame, which is one pixel frame.
        spatial_compression: pixels per latent along height and width.
        text_encoder_parameters: of UMT5-XXL's encoder.
    """

    size: tuple[int, int] = (480, 832)
    sizes: tuple[tuple[int, int], ...] = ((480, 832), (832, 480), (720, 1280), (1280, 720))
    num_frames: int = 81
    fps: int = 16
    frames_per_block: int = 3
    window_frames: int = 21
    temporal_compression: int = 4
    spatial_compression: int = 8
    text_encoder_parameters: int = 5_680_910_336


WAN = WanVideo()

SHIPPED = {"toy": ("hiar_model.toy", "weights"), "scenes": ("hiar_model.toy", "scenes")}
"""Model in this package -> (package, folder in it) of its weights."""


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan2.1 text-to-video transformer.

    Args:
        dim: width. ffn_dim: hidden width of the feed-forward part. num_heads, num_layers: of the transformer.
        freq_dim: width of the sinusoid of the timestep. text_dim, text_len: width and padded length of the prompt.
        in_channels, out_channels: of the latents. patch_size: latent (frames, rows, columns) of one token.
        eps: of every norm. rope_theta: base of the rotary frequencies.
        position_grid: token (rows, columns) of a learned absolute position embedding. None, as published: RoPE alone,
            which is relative, so that in pure noise a token does not know its position in the frame.

    Raises:
        ValueError: names the illegal size and the legal values.

    Example:
        >>> config = WanConfig.from_name("wan2.1-t2v-1.3b")
        >>> config.head_dim, config.grid(60, 104)
        (128, (30, 52))
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_theta: float = 10000.0
    position_grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (list, tuple)) or getattr(value, "ndim", False):
                value = tuple(whole(f"WanConfig: {f.name}", n) for n in value)
            elif f.name in ("eps", "rope_theta"):
                value = number_above_0(f"WanConfig: {f.name}", value)
            elif value is not None:
                value = whole(f"WanConfig: {f.name}", value)
            object.__setattr__(self, f.name, value)
            if value is not None and (min(value) if isinstance(value, tuple) else value) <= 0:
                raise ValueError(f"WanConfig: {f.name} must be positive, got {value}")
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"WanConfig: dim must be num_heads ({self.num_heads}) times an even number, got {self.dim}"
            )
        for name, count in (("patch_size", 3), ("position_grid", 2)):
            if (value := getattr(self, name)) is not None and not (isinstance(value, tuple) and len(value) == count):
                raise ValueError(f"WanConfig: {name} must be {count} whole numbers, got {value}")
        if self.patch_size[0] != 1:
            raise ValueError(f"WanConfig: patch_size[0] must be 1, got {self.patch_size[0]}: a token lies in one frame")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.num_heads

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of tokens in a latent frame of height x width latents."""
        _, ph, pw = self.patch_size
        if height < 1 or width < 1 or height % ph or width % pw:
            raise ValueError(f"latent height and width must be multiples of the patch {ph}x{pw}, got {height}x{width}")
        return height // ph, width // pw

    @staticmethod
    def names() -> tuple[str, ...]:
        """The names that :meth:`from_name` knows."""
        return tuple(_PRESETS)

    @classmethod
    def from_name(cls, name: str) -> WanConfig:
        """The config of a published model or of a shipped one."""
        if name not in _PRESETS:
            raise ValueError(f"model must be one of {', '.join(_PRESETS)}, got {name!r}")
        return cls(**_PRESETS[name])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WanConfig:
        """From a plain mapping; unknown keys raise ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(f"WanConfig: options must be a mapping, got {type(values).__name__}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise ValueError(f"WanConfig: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping, the inverse of :meth:`from_dict`."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items() if v is not None}


def no_folder(name: str) -> str:
    """The end of a message about a model's name that is no folder: what else it may be meant as; empty if nothing."""
    if name in WanConfig.names():
        return "; this one names a size, without weights"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # as hubs name models
        return "; nothing is downloaded: give the folder with its files"
    return ""
