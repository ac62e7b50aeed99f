"""How a LoRA file and its scale are named, in Python and on the command line; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .checks import finite_number, number_within
from .file_option import listed, split_option

LARGEST_SCALE = 3e38
"""What float32 can hold."""


def lora_scale(name: str, value: Any) -> float:
    """The value as a float; ValueError for what is no scale of an adapter."""
    return number_within(name, finite_number(name, value), -LARGEST_SCALE, LARGEST_SCALE)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and the scale it is applied with; ``str()`` of it is FILE:SCALE, as ``--lora`` takes it.

    >>> str(LoraFile.of("style.safetensors:0.8")), LoraFile.of(("style.safetensors", 2)).scale
    ('style.safetensors:0.8', 2.0)
    """

    path: str
    scale: float = 1.0

    @classmethod
    def of(cls, value: Any) -> LoraFile:
        """From a :data:`LoraLike`; ValueError for a scale that is not a finite number."""
        if isinstance(value, LoraFile):
            return value
        name, scale = split_option("lora", value, ":", float, "the scale must be a number")
        return cls(name, 1.0 if scale is None else lora_scale("lora scale", scale))

    def __str__(self) -> str:
        return f"{self.path}:{self.scale!r}".removesuffix(".0")


LoraLike = str | os.PathLike[str] | tuple[str | os.PathLike[str], float] | LoraFile
"""A LoRA file: its path, "path:scale", or (path, scale)."""


def lora_files(values: LoraLike | Iterable[LoraLike] | None) -> tuple[LoraFile, ...]:
    """One or several :data:`LoraLike` as :class:`LoraFile`; None: none."""
    return tuple(LoraFile.of(value) for value in listed("lora", values, LoraFile))
