"""Graphs of a launch: CUDA's, and a stand-in on the CPU that keeps its rules.

A captured graph runs the same kernels on the same addresses and knows nothing of the host: numbers that Python computed
during capture are frozen, and reading a tensor on the host is an error. The stand-in records the operations that torch
dispatches and runs them again, under the same terms, so that what would go wrong on a GPU goes wrong on a CPU too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_READS = "{} reads a tensor on the host, which a captured graph cannot do"


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The one stream of all captures on a device: cuBLAS keeps a workspace for each stream that it ever worked on."""
    return torch.cuda.Stream(device)


class CudaGraphs:
    """Captures on a CUDA device; all graphs share one private pool, as they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
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


class Recording:
    """Operations with the tensors they read and wrote."""

    def __init__(self, calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
        self.calls = calls

    def replay(self) -> None:
        """Run them again; results are written to where they were the first time, as a graph's addresses are fixed."""
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, Tensor) and old is not new and not _same_memory(old, new):
                        old.copy_(new)


class _Reads(TorchFunctionMode):
    """Refuses what torch does on a CPU tensor without dispatching anything."""

    NAMES = frozenset({"tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            raise RuntimeError(_READS.format(name))
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """The stand-in's capture: ``Recorder.capture`` runs and records."""

    # What waits for the device, each time it is called.
    READS = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @classmethod
    def capture(cls, run: Callable[[], Any]) -> Recording:
        """What ``run`` does, recorded while it runs."""
        recorder = cls()
        with _Reads(), recorder:
            run()
        return Recording(recorder.calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name().partition(".")[0] in self.READS:
            raise RuntimeError(_READS.format(func.name()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())
