"""Named ranges for Nsight Systems: generate > block > visit > layer > op. Off unless asked for; see docs/profiling.md.

On with ``HIAR_NVTX=1`` in the environment when this package is imported, or by :func:`enable`.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch

_OFF: AbstractContextManager[Any] = nullcontext()
_on = os.environ.get("HIAR_NVTX", "0") not in ("", "0")


def enable(on: bool = True) -> None:
    """Switch the ranges on or off for this process."""
    global _on
    _on = on


def span(name: str, *parts: object) -> AbstractContextManager[Any]:
    """``with span("layer", 3):`` marks a range "layer 3". Off, it makes no string and no object."""
    if not _on or torch.compiler.is_compiling():
        return _OFF
    return _Span(" ".join([name, *map(str, parts)]))


class _Span:
    """One range: for nsys, and for torch's profiler, which needs no CUDA."""

    def __init__(self, name: str) -> None:
        self.record = torch.profiler.record_function(name)
        self.name = name

    def __enter__(self) -> None:
        self.record.__enter__()
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()
        self.record.__exit__(kind, value, trace)
