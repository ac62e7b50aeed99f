"""Capture of device work, such as batched forwards, as CUDA graphs.

A captured graph replays the same kernels on the same addresses without the host: numbers that Python computed during
capture are frozen, and reading a tensor on the host is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures on a device: cuBLAS keeps a workspace for each stream that it has worked on."""
    return torch.cuda.Stream(device)


class CudaGraphs:
    """Captures on one CUDA device. All graphs share one private memory pool, as they never run at the same time.

    Raises:
        ValueError: the device is not CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a CUDA device, the model is on {device}")
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        """Run once, so that everything is compiled and loaded, then capture (which executes nothing)."""
        with torch.cuda.device(self.device):
            current, stream = torch.cuda.current_stream(), _capture_stream(self.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                run()
        return graph
