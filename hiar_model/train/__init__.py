"""Training: teacher forcing, and distillation by self-rollout. Nothing is imported until its name is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .losses.dmd import dmd_gradient, dmd_loss
    from .losses.forward_kl import trajectory_x0

__all__ = ["dmd_gradient", "dmd_loss", "trajectory_x0"]

_HOME = {"dmd_gradient": "losses.dmd", "dmd_loss": "losses.dmd", "trajectory_x0": "losses.forward_kl"}
"""Public name -> the module that holds it."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # next time without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
