"""Shape checks of a rollout's inputs, at the call or where a callable returns them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..common.checks import one_line, whole
from ..config import WanConfig


def require_kind(name: str, value: object, kind: type) -> None:
    """ValueError unless it is an object of this class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a hiar_model.{kind.__name__}, got {type(value).__name__}")


def pair(name: str, value: Any) -> tuple[int, int]:
    """(height, width) of at least 1; ValueError for what is none."""
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(f"{name} must be (height, width) of a latent frame, got {one_line(value)}")
    return whole(name, value[0], 1), whole(name, value[1], 1)


def require_shape(name: str, actual: Any, expected: tuple[int | None, ...]) -> None:
    """ValueError unless ``actual``, a tensor of real numbers or a shape, has the ``expected`` shape; None matches any
    size.
    """
    if not isinstance(actual, Tensor | tuple):
        raise ValueError(f"{name} must be a tensor {_shown(expected)}, got {type(actual).__name__}")
    if isinstance(actual, Tensor) and not actual.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, got {actual.dtype}")
    shape = tuple(actual.shape) if isinstance(actual, Tensor) else actual
    if len(shape) != len(expected) or any(e not in (None, a) for a, e in zip(shape, expected, strict=True)):
        raise ValueError(f"{name} must be {_shown(expected)}, got {list(shape)}")


def _shown(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"


def check_prompt_embeds(prompt_embeds: Any, batch: int, config: WanConfig, name: str = "prompt_embeds") -> None:
    """ValueError unless they are [1 or batch, L, text_dim] with L at most text_len."""
    legal = f"[{f'1 or {batch}' if batch > 1 else '1'}, at most {config.text_len}, {config.text_dim}]"
    if not isinstance(prompt_embeds, Tensor):
        raise ValueError(f"{name} must be a tensor {legal}, got {type(prompt_embeds).__name__}")
    if not prompt_embeds.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, got {prompt_embeds.dtype}")
    count, length, width = prompt_embeds.shape if prompt_embeds.dim() == 3 else (0, 0, 0)
    if count not in (1, batch) or length > config.text_len or width != config.text_dim:
        videos = f"one prompt for all {batch} videos or one for each" if batch > 1 else "the prompt of one video"
        raise ValueError(f"{name} must be {legal} ({videos}), got {list(prompt_embeds.shape)}")


@dataclass(frozen=True)
class CheckedPrompts:
    """Prompt embeddings of blocks, each checked when it is asked for."""

    source: Callable[[int], Tensor]
    batch: int
    config: WanConfig

    def __call__(self, block: int) -> Tensor:
        prompt_embeds = self.source(block)
        check_prompt_embeds(prompt_embeds, self.batch, self.config, f"prompt_embeds of block {block}")
        return prompt_embeds


@dataclass(frozen=True)
class CheckedNoise:
    """Noise of (step, block), likewise. frames: block -> [start, stop). shape: (B, C, H, W) of a frame."""

    source: Callable[[int, int], Tensor]
    frames: Callable[[int], tuple[int, int]]
    shape: tuple[int, int, int, int]

    def __call__(self, step: int, block: int) -> Tensor:
        noise, (start, stop) = self.source(step, block), self.frames(block)
        batch, *size = self.shape
        require_shape(f"noise(step {step}, block {block})", noise, (batch, stop - start, *size))
        return noise
