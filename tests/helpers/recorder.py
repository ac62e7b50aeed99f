"""A stand-in for CUDA graphs that keeps their rules on a CPU.

It records the operations that torch dispatches and runs them again: numbers that Python computed are frozen, and
reading a tensor on the host is an error, so that what would go wrong on a GPU goes wrong on a CPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hiar_kernels.common import torch_library

_READS = "{} reads a tensor on the host, which a captured graph cannot do"


@contextmanager
def recorded() -> Iterator[None]:
    """Rollouts made inside with cuda_graph=True record their forwards in place of capturing them."""
    with patch("hiar_model.rollout.executor.CudaGraphs", lambda device: Recorder.capture):
        yield


class Recording:
    """Operations with the tensors they read and wrote."""

    def __init__(self, calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
        self.calls = calls
        self.work = [(*call[:3], _leaves(call[3])) for call in calls if not call[0].is_view]

    def replay(self) -> None:
        """Run them again; results are written to where they were the first time, as a graph's addresses are fixed: a
        view of them is the same view.
        """
        with torch.no_grad():
            for function, args, kwargs, results in self.work:
                again = function(*args, **kwargs)
                for old, new in zip(results, _leaves(again), strict=True):
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
    def _should_skip_dynamo(cls) -> bool:
        """Torch asks. If so, it imports its compiler at the first call, to keep it from all; nothing compiles here."""
        return False

    @classmethod
    def capture(cls, run: Callable[[], Any]) -> Recording:
        """What ``run`` does, recorded while it runs."""
        torch_library._remembered.clear()  # on a CPU alone: what was made before would be missing in the recording
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


def _leaves(result: Any) -> list[Any]:
    """What an operation returned; nearly always one tensor, for which torch's own function is slow."""
    return [result] if isinstance(result, Tensor) else tree_flatten(result)[0]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
