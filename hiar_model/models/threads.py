"""CPU threads of torch: one for networks whose matrices are too small to split.

Threads synchronise after every operation. In a small network that takes longer than the work itself, and many times as
long if other programs use the cores too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .transformer import HiARTransformer

SMALL = 2**20
"""Most numbers in a matrix of a small network. The toy's largest has 2^16, that of Wan 1.3B 13 times this."""


def is_small(*networks: HiARTransformer) -> bool:
    """Whether the networks are small and on a CPU."""
    sizes = [network.config.dim * network.config.ffn_dim for network in networks]
    on_cpu = all(network.patch_embedding.weight.device.type == "cpu" for network in networks)
    return on_cpu and max(sizes) <= SMALL


def fitting_threads(*networks: HiARTransformer, requested: int | None = None) -> int | None:
    """The number of threads for the networks: ``requested`` if set, else 1 for small ones, else None: unchanged."""
    return requested or (1 if is_small(*networks) else None)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Use so many threads of torch inside, and the previous number again afterwards; None: unchanged."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
