"""The sizes that kernels are compiled for ahead of time, those of a small and of a large transformer in use; and the
strides of a tensor that matter.
"""

from __future__ import annotations

from torch import Tensor

HEAD_DIM = 128
HEADS = (12, 40)
CHANNELS = tuple(heads * HEAD_DIM for heads in HEADS)
FEED_FORWARD = {1536: 8960, 5120: 13824}
"""Channels of the hidden layer of the feed-forward by those of the model."""


def steps(x: Tensor) -> tuple[int, ...]:
    """Strides of x; of dimensions of size 1, along which nothing steps, those that a dense tensor would have.

    >>> import torch
    >>> steps(torch.empty(1, 2, 4).as_strided((1, 2, 4), (3, 4, 1)))
    (8, 4, 1)
    """
    result: list[int] = []
    dense = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        result.insert(0, stride if size > 1 else dense)
        dense = size * result[0]
    return tuple(result)
