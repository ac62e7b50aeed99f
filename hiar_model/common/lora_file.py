"""How a LoRA file and its scale are named, in Python and on the command line; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .checks import finite_number, number_within, path_like

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
        path, scale = value if isinstance(value, tuple) and len(value) == 2 else (value, 1.0)
        path_like("lora", path)
        name = os.fspath(path)
        head, colon, tail = name.rpartition(":")
        if not isinstance(value, tuple) and colon and not os.path.exists(name):
            try:
                name, scale = head, float(tail)
            except ValueError:
                if os.path.exists(head):
                    raise ValueError(f"lora {name}: the scale must be a number, got {tail!r}") from None
        if not name:
            raise ValueError(f"lora {value}: no file before the scale; expected FILE or FILE:SCALE")
        return cls(name, lora_scale("lora scale", scale))

    def __str__(self) -> str:
        return f"{self.path}:{self.scale!r}".removesuffix(".0")


LoraLike = str | os.PathLike[str] | tuple[str | os.PathLike[str], float] | LoraFile
"""A LoRA file: its path, "path:scale", or (path, scale)."""


def lora_files(values: LoraLike | Iterable[LoraLike] | None) -> tuple[LoraFile, ...]:
    """One or several :data:`LoraLike` as :class:`LoraFile`; None: none."""
    if values is None:
        return ()
    single = isinstance(values, str | os.PathLike | LoraFile)
    pair = isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], Real)
    if not (single or pair) and (isinstance(values, bytes | Mapping) or not isinstance(values, Iterable)):
        raise ValueError(f"lora must be a file, FILE:SCALE, (file, scale), or a list of these, got {values!r}")
    listed: Iterable[Any] = [values] if single or pair else values  # type: ignore[assignment]
    return tuple(LoraFile.of(value) for value in listed)
