"""Sums that tell whether the tensors of a state are what was written, however they are sharded: number by number, where
those of a session (:mod:`hiar_model.rollout.state_io`) take eight bytes at a time, which is faster in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .distributed import is_first

_NARROW = {1: torch.uint8, 2: torch.int16}  # by size of a number in bytes


def checksums(state: Mapping[str, Any]) -> dict[str, int]:
    """For each tensor of a nested state, the sum of its numbers' bits as whole numbers, modulo 2**32; on all processes.

    Every rank must call it. A bit that has changed is always noticed; numbers that changed places are not.

    >>> checksums({"a": torch.tensor([1, 2]), "b": {"c": torch.tensor(-1, dtype=torch.int32)}})
    {'a': 3, 'b.c': 4294967295}
    """
    ours = {name: _local_sum(tensor) for name, tensor in _tensors(state)}
    of_all = [ours]
    if dist.is_initialized():
        of_all = of_all * dist.get_world_size()
        dist.all_gather_object(of_all, ours)
    return {name: sum(one[name] for one in of_all) % 2**32 for name in ours}


def _tensors(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value


def _local_sum(tensor: Tensor) -> int:
    """Of this process's part; 0 where another process has the same one. Wraps: 32 bits are ten times as fast as 64."""
    first, local = is_first(), tensor.detach()
    if isinstance(local, DTensor):
        places = zip(local.placements, local.device_mesh.get_coordinate() or (), strict=True)
        first = not any(placement.is_replicate() and place for placement, place in places)
        local = local.to_local()
    words = local.reshape(-1).view(_NARROW.get(local.element_size(), torch.int32))
    return int(words.sum(dtype=torch.int32)) if first else 0
