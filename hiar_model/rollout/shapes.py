"""What is handed to a rollout has the shapes that it takes: refused at the call, or where a callable returns it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import WanConfig


def require_shape(name: str, actual: Any, expected: tuple[int | None, ...]) -> None:
    """ValueError unless ``actual``, a tensor or a shape, is of the ``expected`` one; None there stands for any size."""
    if not isinstance(actual, Tensor | tuple):
        raise ValueError(f"{name} must be a tensor {_shown(expected)}, got {type(actual).__name__}")
    shape = tuple(actual.shape) if isinstance(actual, Tensor) else actual
    if len(shape) != len(expected) or any(e not in (None, a) for a, e in zip(shape, expected, strict=True)):
        raise ValueError(f"{name} must be {_shown(expected)}, got {list(shape)}")


def _shown(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"


def check_text(text: Any, batch: int, config: WanConfig, name: str = "text") -> None:
    """ValueError unless it is a prompt embedding of one prompt, or of one for each video."""
    legal = f"[{f'1 or {batch}' if batch > 1 else '1'}, at most {config.text_len}, {config.text_dim}]"
    if not isinstance(text, Tensor):
        raise ValueError(f"{name} must be a tensor {legal}, got {type(text).__name__}")
    count, length, width = text.shape if text.dim() == 3 else (0, 0, 0)
    if count not in (1, batch) or length > config.text_len or width != config.text_dim:
        videos = f"one prompt for all {batch} videos or one for each" if batch > 1 else "the prompt of one video"
        raise ValueError(f"{name} must be {legal} ({videos}), got {list(text.shape)}")


@dataclass(frozen=True)
class CheckedTexts:
    """Texts of blocks, each looked at before a forward takes it."""

    given: Callable[[int], Tensor]
    batch: int
    config: WanConfig

    def __call__(self, block: int) -> Tensor:
        text = self.given(block)
        check_text(text, self.batch, self.config, f"text of block {block}")
        return text


@dataclass(frozen=True)
class CheckedNoise:
    """Noise of (step, block), likewise. frames: of a block. shape: (B, C, H, W) of its frames."""

    given: Callable[[int, int], Tensor]
    frames: Callable[[int], tuple[int, int]]
    shape: tuple[int, int, int, int]

    def __call__(self, step: int, block: int) -> Tensor:
        noise, (start, stop) = self.given(step, block), self.frames(block)
        batch, *size = self.shape
        require_shape(f"noise(step {step}, block {block})", noise, (batch, stop - start, *size))
        return noise
