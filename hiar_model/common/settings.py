"""Settings of the process that change what torch computes: pinned while we compute, the caller's again behind it.

A program may make float64 its default dtype, a GPU its default device, or allow TF32 for its own training. The same
seed gives the same video whatever it has chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_backends: Any = torch.backends  # whose stubs lack some of it
PINNED: tuple[tuple[Any, str, Any], ...] = (
    (_backends.mkldnn.matmul, "fp32_precision", "ieee"),
    (_backends.mkldnn.conv, "fp32_precision", "ieee"),
    (_backends.cuda.matmul, "fp32_precision", "ieee"),
    (_backends.cudnn.conv, "fp32_precision", "tf32"),  # torch's default
)
_UNSET = {"none": "ieee"}  # what torch does where nothing is said


@contextmanager
def own_settings(autocast: bool = False) -> Iterator[None]:
    """Torch's own defaults inside: float32, the CPU, no autocast, no inference mode, nothing demanded of algorithms,
    float32 products in float32. Works as a decorator too.

    Args:
        autocast: leave autocast as the caller has it.
    """
    with ExitStack() as back:
        if torch.get_default_dtype() != torch.float32:
            back.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.is_inference_mode_enabled():
            back.enter_context(torch.inference_mode(False))
            back.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":
            back.enter_context(torch.device("cpu"))
        if torch.are_deterministic_algorithms_enabled():
            warn = torch.is_deterministic_algorithms_warn_only_enabled()
            back.callback(torch.use_deterministic_algorithms, True, warn_only=warn)
            torch.use_deterministic_algorithms(False)
        for place, name, value in PINNED:
            before = getattr(place, name)
            if _UNSET.get(before, before) != value:
                back.callback(setattr, place, name, before)
                setattr(place, name, value)
        for device in () if autocast else ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                back.enter_context(torch.autocast(device, enabled=False))
        yield
