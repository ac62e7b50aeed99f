"""Loading of the CUDA extension and registration of its kernels.

The extension (csrc/) registers kernels as ``hiar_cuda::<op>``; ``cuda.py`` in the folder of an op checks arguments,
allocates outputs and calls them. It is loaded when the first of them is asked for.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import extension
from .torch_library import LIBRARY, PACKAGES

emulation: Path | None = None
"""csrc/ built for the host, kernels as loops. If tests set it, impl="cuda" takes CPU tensors only."""


def missing() -> str | None:
    """Why impl="cuda" cannot run here, in one line; None where it can."""
    return _missing()


@functools.cache
def _missing() -> str | None:
    return None if emulation is not None else extension.missing()


def status() -> str:
    """What was built, or why nothing was, as text."""
    why = missing()
    if why is not None:
        return f"not built: {why}"
    if emulation is not None:
        return f"built for the host: {emulation}"
    built = extension.record()
    return f"built for sm_{', sm_'.join(built['archs'])} by nvcc {built['nvcc']}"


def automatic(tensor: Tensor) -> bool:
    """Whether ``impl="auto"`` may choose it for this tensor."""
    return tensor.is_cuda and missing() is None


def load(op: str, tensor: Tensor) -> None:
    """Load the CUDA kernel of an op for the tensor's device, or raise ValueError with the reason.

    Loads the extension and ``hiar_kernels.<folder of op>.cuda`` at the first call.
    """
    _load(op, str(tensor.device))


def _load(op: str, device: str) -> bool:
    return _loaded(op, device)


# torch.compile calls these two while tracing instead of tracing them: they read files and import.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _loaded(op: str, device: str) -> bool:
    why = missing()
    if why is not None:
        raise ValueError(f"{op}: impl='cuda' needs the CUDA extension, which is not built: {why}")
    device_type = "cuda" if emulation is None else "cpu"
    if not device.startswith(device_type):
        raise ValueError(f"{op}: impl='cuda' needs a {device_type.upper()} tensor, got one on {device}")
    library = emulation or extension.PACKAGE / extension.LIBRARY
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{op}: impl='cuda' cannot load its library: {reason}") from None
    importlib.import_module(f"{PACKAGES[op]}.cuda")
    return True


def register(name: str, launcher: Callable[..., Any]) -> None:
    """Let a launcher serve ``hiar::name`` on CUDA tensors (in the emulation on CPU tensors)."""
    LIBRARY.impl(name, launcher, "CUDA" if emulation is None else "CPU")
