"""CPU threads of torch: one where the matrices of a network are too small to be shared out.

Threads wait for each other behind every operation. In a small network that takes longer than the work, and many times
as long where other programs want the cores too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .transformer import HiARTransformer

SMALL = 2**20
"""Numbers in the largest matrix of a small network. The toy's has 2^16, that of Wan 1.3B 13 times this."""


def is_small(*networks: HiARTransformer) -> bool:
    """Whether the networks are small and on a CPU."""
    sizes = [network.config.dim * network.config.ffn_dim for network in networks]
    on_cpu = all(network.patch_embedding.weight.device.type == "cpu" for network in networks)
    return on_cpu and max(sizes) <= SMALL


def fitting_threads(*networks: HiARTransformer, asked: int | None = None) -> int | None:
    """How many threads the networks should run in: what is asked for, if anything; 1 for small ones; None: as it is."""
    return asked or (1 if is_small(*networks) else None)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """So many threads of torch inside, and the caller's number again behind it, whatever happens; None: as it is."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    assert count is not None
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
