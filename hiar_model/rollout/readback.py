"""Asynchronous copies of small results from the device to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Readback:
    """Starts copying ``x`` to the host; waits for it only when it is read."""

    def __init__(self, x: Tensor) -> None:
        self.done: Any = None
        if x.device.type != "cuda":
            self.host = x.clone()
            return
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        self.done = torch.cuda.Event()
        self.done.record(torch.cuda.current_stream(x.device))

    def numbers(self) -> list[Any]:
        """The values: the one place where a rollout's host waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        return self.host.tolist()
