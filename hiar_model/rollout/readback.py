"""Small results of the device on their way to the host: nothing waits when they are sent, only when they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Readback:
    """A copy of ``x`` on the host, as it is once the device has done all that was asked of it so far."""

    def __init__(self, x: Tensor) -> None:
        self.done: Any = None
        if x.device.type != "cuda":
            self.host = x.clone()
            return
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        self.done = torch.cuda.Event()
        self.done.record(torch.cuda.current_stream(x.device))

    def numbers(self) -> list[Any]:
        """The values; the one place where a rollout's host waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        return self.host.tolist()
