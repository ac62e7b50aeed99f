"""Tensors that say they are on CUDA, for code that asks, on a machine without it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class OnCuda(TorchFunctionMode):
    """A CPU build of torch cannot make fake CUDA tensors that can be indexed: this changes only what they answer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **(kwargs or {}))
