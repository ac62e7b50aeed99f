"""Named ranges for Nsight Systems: generate > block > visit > layer > op. Off unless asked for; docs/howto/profile.md.

On with ``HIAR_NVTX=1`` in the environment when this package is imported, or by :func:`enable`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_OFF: AbstractContextManager[Any] = nullcontext()
_on = os.environ.get("HIAR_NVTX", "0") not in ("", "0")


def enable(on: bool = True) -> None:
    """Switch the ranges on or off for this process."""
    global _on
    _on = on


def span(name: str, *parts: object) -> AbstractContextManager[Any]:
    """``with span("layer", 3):`` marks a range "layer 3". When off it creates no string and no object."""
    if not _on or torch.compiler.is_compiling():
        return _OFF
    return _range(" ".join([name, *map(str, parts)]))


@contextmanager
def _range(name: str) -> Iterator[None]:
    """A range in nsys and in torch's profiler, which needs no CUDA."""
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else _OFF
    with torch.profiler.record_function(name), nvtx:
        yield
