"""Sizes of the network; nothing about them stands anywhere else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .common.checks import whole

_PRESETS: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
    "wan2.1-t2v-14b": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "toy": {
        "dim": 128, "ffn_dim": 512, "num_heads": 2, "num_layers": 6, "freq_dim": 64, "text_dim": 32, "text_len": 8,
        "position_grid": (4, 4),
    },
}  # fmt: skip


@dataclass(frozen=True)
class WanVideo:
    """What Wan 2.1 makes, as it was trained, and what its causal few-step models share.

    size, num_frames, fps   of a video: pixels (height, width), pixel frames, pixel frames a second
    frames_per_block, window_frames   latent frames made at once, and seen by a block, its own among them
    temporal_compression    pixel frames per latent frame; the first latent frame is always one pixel frame
    spatial_compression     pixels of a latent along a side
    text_encoder_parameters   of UMT5-XXL's encoder, as published
    """

    size: tuple[int, int] = (480, 832)
    num_frames: int = 81
    fps: int = 16
    frames_per_block: int = 3
    window_frames: int = 21
    temporal_compression: int = 4
    spatial_compression: int = 8
    text_encoder_parameters: int = 5_680_910_336


WAN = WanVideo()

SHIPPED = {"toy": ("hiar_model.toy", "weights")}
"""Name of a model inside the package -> (package, folder in it)."""


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan2.1 text-to-video transformer.

    Args:
        dim: width. ffn_dim: hidden width of the feed-forward part. num_heads, num_layers: of the transformer.
        freq_dim: width of the sinusoid of the timestep. text_dim, text_len: width and padded length of the prompt.
        in_channels, out_channels: of the latents. patch_size: latent (frames, rows, columns) of one token.
        eps: of every norm. rope_theta: base of the rotary frequencies.
        position_grid: token (rows, columns) of a learned absolute position embedding. None, as published: RoPE alone,
            which is relative, so that pure noise does not tell a token where in the frame it is.
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
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.position_grid is not None:
            object.__setattr__(self, "position_grid", tuple(self.position_grid))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("eps", "rope_theta") and value is not None:
                each = [whole(f"WanConfig: {f.name}", one) for one in (value if isinstance(value, tuple) else (value,))]
                value = tuple(each) if isinstance(value, tuple) else each[0]  # numpy's too, which JSON would refuse
                object.__setattr__(self, f.name, value)
            if value is not None and (min(value) < 1 if isinstance(value, tuple) else value <= 0):
                raise ValueError(f"WanConfig: {f.name} must be positive, got {value}")
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"WanConfig: dim {self.dim} is not num_heads {self.num_heads} times an even number")
        if self.patch_size[0] != 1:
            raise ValueError(
                f"WanConfig: a token must lie in one frame: patch_size[0] must be 1, got {self.patch_size[0]}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.num_heads

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of tokens in a latent frame of height x width."""
        _, ph, pw = self.patch_size
        if height < 1 or width < 1 or height % ph or width % pw:
            raise ValueError(f"latent frame {height}x{width} is no multiple of the patch {ph}x{pw}")
        return height // ph, width // pw

    @staticmethod
    def names() -> tuple[str, ...]:
        """The names that :meth:`from_name` knows."""
        return tuple(_PRESETS)

    @classmethod
    def from_name(cls, name: str) -> WanConfig:
        """A published size, or the toy model's."""
        if name not in _PRESETS:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WanConfig:
        """From a plain mapping; unknown keys are refused."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"WanConfig: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path) -> WanConfig:
        """From a JSON file with the fields of this class."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping, as :meth:`from_dict` reads it."""
        values = {**asdict(self), "patch_size": list(self.patch_size)}
        if self.position_grid is None:
            del values["position_grid"]
        else:
            values["position_grid"] = list(self.position_grid)
        return values
