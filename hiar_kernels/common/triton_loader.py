"""Loading of the Triton kernels and their registration as implementations of the ops.

The interpreter (TRITON_INTERPRET=1, read by Triton when it is imported) runs kernels on the CPU, for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .torch_library import LIBRARY, PACKAGES

# Every launch says whether products and sums may be contracted: Triton's default is yes up to 3.9 and no from 3.10 on.
FUSED, UNFUSED = {"enable_fp_fusion": True}, {"enable_fp_fusion": False}
INTERPRETED = 0  # "architecture" of the interpreter: small tiles, so that small tests have many


def architecture(x: Tensor) -> int:
    """10 x major + minor of the device's compute capability; 0 in the interpreter."""
    if not x.is_cuda:
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(x.device)
    return 89 if (major, minor) == (8, 6) else 10 * major + minor  # like 8.0, with the shared memory of 8.9


_shapes_only = False


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def load(op: str, tensor: Tensor) -> None:
    """Load the Triton kernels of ``torch.ops.hiar.<op>`` for the tensor's device, or raise ValueError with the reason.

    Imports ``hiar_kernels.<folder of op>.triton_fwd`` (and ``triton_bwd`` where there is one) at the first call.
    """
    if not _shapes_only:
        _load(op, str(tensor.device))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within this block ``impl="triton"`` loads no kernel: fake tensors show what would be allocated."""
    global _shapes_only
    before, _shapes_only = _shapes_only, True
    try:
        yield
    finally:
        _shapes_only = before


def _load(op: str, device: str) -> bool:
    return _loaded(op, device)


# torch.compile cannot trace an import, so it calls this while tracing. torch.compiler.assume_constant_result does the
# same, but imports torch._dynamo and with it triton.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache  # uncached this would cost as much as the launch
def _loaded(op: str, device: str) -> bool:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"{op}: impl='triton' needs triton, which is not installed")
    allowed = device.startswith("cuda") or (device == "cpu" and interpreting())
    if not allowed:
        raise ValueError(f"{op}: impl='triton' needs a CUDA tensor (or TRITON_INTERPRET=1), got one on {device}")
    if interpreting():
        from . import interpreter

        interpreter.repair()
    package = PACKAGES[op]
    importlib.import_module(f"{package}.triton_fwd")
    if importlib.util.find_spec(f"{package}.triton_bwd") is not None:
        importlib.import_module(f"{package}.triton_bwd")
    return True


def register(name: str, launcher: Callable[..., Any]) -> None:
    """Let a launcher serve ``hiar::name`` on CUDA tensors, in the interpreter on CPU tensors too.

    The launcher takes the op's arguments and returns freshly allocated outputs, contiguous as the fake says.
    """
    LIBRARY.impl(name, launcher, "CUDA")
    if interpreting():
        LIBRARY.impl(name, launcher, "CPU")
