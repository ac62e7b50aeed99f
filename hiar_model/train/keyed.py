"""Randomness of training as a function of a key: never of rank, process, order or history.

So a resumed run needs no saved generator, and any number of ranks draws the same batches:
sample ``row`` of update ``update`` of a stage is drawn from ``keyed_generator(seed, stage, update, row)``.
"""

from __future__ import annotations

import hashlib
import json

import torch

from ..checks import as_whole


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator whose state follows from ``seed`` and ``key`` alone; other keys give independent ones.

    Raises:
        ValueError: a part of the key is no whole number or text.
    """
    parts = [part if isinstance(part, str) else as_whole(part) for part in (seed, *key)]
    for part, given in zip(parts, (seed, *key), strict=True):
        if part is None:
            raise ValueError(f"keyed_generator: a key is made of whole numbers and texts, got {given!r}")
    # JSON keeps 1 apart from "1", and ("ab", "c") from ("a", "bc").
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
