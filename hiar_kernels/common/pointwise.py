"""Argument checks and the choice of "auto", shared by the pointwise ops."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from . import cuda_loader, triton_loader
from .dispatch import require_autograd

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST_NORM = 8192  # channels: a norm kernel holds whole rows in registers
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

WHY = (
    "triton (one pass over memory) for bfloat16, float16 and float32 CUDA tensors where triton is installed; "
    "reference elsewhere"
)


def automatic(x: Tensor, *others: Tensor | None, norm: bool = False, cuda: bool = False) -> str:
    """The implementation of ``impl="auto"`` for these floats; ``cuda``: the op has a CUDA kernel too."""
    takes = x.is_cuda and all(t is None or t.dtype in DTYPES for t in (x, *others))
    if not takes or (norm and x.shape[-1] > WIDEST_NORM):
        return "reference"
    return "triton" if TRITON_INSTALLED else "cuda" if cuda and cuda_loader.automatic(x) else "reference"


def prepare(op: str, *, impl: str = "triton", norm: bool = False, **tensors: Tensor | None) -> None:
    """Load an op's Triton or CUDA kernels for the first tensor's device; raise ValueError for unsupported tensors."""
    first, x = next((name, t) for name, t in tensors.items() if t is not None)
    (cuda_loader if impl == "cuda" else triton_loader).load(op, x)
    require_autograd(op, impl, *tensors.values())
    for name, t in tensors.items():
        if t is not None and t.dtype not in DTYPES:
            raise ValueError(f"{op}: impl={impl!r} takes {name} as bfloat16, float16 or float32, got {t.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like {first}, got {t.device}")
    if norm and x.shape[-1] > WIDEST_NORM:
        raise ValueError(f"{op}: impl={impl!r} takes at most {WIDEST_NORM} channels, got {x.shape[-1]}")
