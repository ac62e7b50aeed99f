"""What the pointwise ops share on the host: what their Triton kernels take, and when "auto" chooses them."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from . import _triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST_NORM = 8192  # channels: a norm kernel holds whole rows in registers
_INSTALLED = importlib.util.find_spec("triton") is not None

WHY = (
    "triton (one pass over memory) for bfloat16, float16 and float32 CUDA tensors where triton is installed; "
    "reference elsewhere"
)


def automatic(x: Tensor, *others: Tensor | None, norm: bool = False) -> str:
    """The implementation that ``impl="auto"`` takes for these arguments."""
    if not (x.is_cuda and _INSTALLED) or (norm and x.shape[-1] > WIDEST_NORM):
        return "reference"
    return "triton" if all(t is None or t.dtype in DTYPES for t in (x, *others)) else "reference"


def prepare(op: str, *, norm: bool = False, **tensors: Tensor | None) -> None:
    """Load an op's Triton kernels for the first of the tensors; refuse in one line what they do not take."""
    first, x = next((name, t) for name, t in tensors.items() if t is not None)
    _load(op, str(x.device))
    for name, t in tensors.items():
        if t is not None and t.dtype not in DTYPES:
            raise ValueError(f"{op}: impl='triton' takes {name} as bfloat16, float16 or float32, got {t.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like {first}, got {t.device}")
    if norm and x.shape[-1] > WIDEST_NORM:
        raise ValueError(f"{op}: impl='triton' takes at most {WIDEST_NORM} channels, got {x.shape[-1]}")


def _load(op: str, device: str) -> bool:
    return _loaded(op, device)


# torch.compile cannot trace an import, so it shall run this while it traces. As torch.compiler.assume_constant_result
# does, which would import torch._dynamo and with it triton.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache  # what an op costs at every call would be as much as the launch
def _loaded(op: str, device: str) -> bool:
    _triton.load(op, torch.empty(0, device=device))
    return True
