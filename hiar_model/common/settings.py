"""Global torch settings that change results: set to fixed values while we compute, then restored.

A program may make float64 its default dtype, a GPU its default device, or allow TF32 for its own training. The same
seed gives the same video whatever it has chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_backends: Any = torch.backends  # whose type stubs are incomplete
PINNED: tuple[tuple[Any, str, Any], ...] = (
    (_backends.mkldnn.matmul, "fp32_precision", "ieee"),
    (_backends.mkldnn.conv, "fp32_precision", "ieee"),
    (_backends.cuda.matmul, "fp32_precision", "ieee"),
    (_backends.cudnn.conv, "fp32_precision", "tf32"),  # torch's default
)
_UNSET = {"none": "ieee"}  # what an unset value means


@contextmanager
def own_settings(autocast: bool = False, gradients: bool = False) -> Iterator[None]:
    """Run with torch's defaults: float32, the CPU, no autocast, no inference mode, no deterministic algorithms, float32
    matrix products in float32. Works as a decorator too.

    Args:
        autocast: leave autocast as the caller has it. gradients: record them, even inside the caller's ``no_grad``.
    """
    with ExitStack() as restore:
        if torch.get_default_dtype() != torch.float32:
            restore.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.is_inference_mode_enabled():
            restore.enter_context(torch.inference_mode(False))
            restore.enter_context(torch.no_grad())
        if gradients:
            restore.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            restore.enter_context(torch.device("cpu"))
        if torch.are_deterministic_algorithms_enabled():
            warn = torch.is_deterministic_algorithms_warn_only_enabled()
            restore.callback(torch.use_deterministic_algorithms, True, warn_only=warn)
            torch.use_deterministic_algorithms(False)
        for module, name, value in PINNED:
            before = getattr(module, name)
            if _UNSET.get(before, before) != value:
                restore.callback(setattr, module, name, before)
                setattr(module, name, value)
        for device in () if autocast else ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                restore.enter_context(torch.autocast(device, enabled=False))
        yield
