"""Captured CUDA graphs of batched forwards.

A captured graph runs the same kernels on the same addresses and knows nothing of the host: numbers that Python computed
during capture are frozen, and reading a tensor on the host is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The one stream of all captures on a device: cuBLAS keeps a workspace for each stream that it ever worked on."""
    return torch.cuda.Stream(device)


class CudaGraphs:
    """Captures on a CUDA device; all graphs share one private pool, as they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a CUDA device, the model is on {device}")
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        """Run, on a stream aside, so that all is compiled and loaded; then capture there, which executes nothing."""
        with torch.cuda.device(self.device):
            current, aside = torch.cuda.current_stream(), _aside(self.device)
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                run()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=aside, capture_error_mode="thread_local"):
                run()
        return graph
