"""What tests of the Hopper attention kernels share: the device that they need, masks and rings, a captured graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hiar_kernels as hk
from hiar_kernels.attention import gluon

# mask, frame ids of the queries, of the keys (-1 empty), heads
CASES = {
    "whole blocks only": (hk.BlockCausal(128, 1, 3), [[4]], [[2, 3, 4, -1]], 2),
    "less than a block": (hk.BlockCausal(50, 2, 6), [[6, 7]], [[2, 3, 4, 5, 6, 7, -1, 0]], 1),
    "window and sink": (hk.BlockCausal(70, 3, 5, 1), [[9, 10, 11]], [[0, 10, 11, 7, 8, 9, 4]], 2),
    "two tasks in a row": (hk.BlockCausal(520, 3, 6), [[3, 4, 5, 6, 7, 8]], [[0, 1, 2, 3, 4, 5, 6, 7, 8]], 6),
    "items at different tasks": (
        hk.BlockCausal(300, 2, (2, 6, 4)),
        [[0, 1], [6, 7], [2, 3]],
        [[0, 1, -1, -1, -1, -1], [6, 7, 2, 3, 4, 5], [0, 1, 2, 3, -1, -1]],
        12,
    ),
    "a query that sees nothing": (hk.BlockCausal(64, 1, 2), [[0, 9]], [[0, -1, 4]], 2),
    "nothing visible at all": (hk.BlockCausal(64, 1, 2), [[9]], [[0, -1]], 2),
}
IN_8_BITS = {  # the smallest first, so that a hang names its cause
    "less than a group": (hk.BlockCausal(5, 1, 3), [[4]], [[2, 3, 4, -1]], 3),
    **CASES,
    "half empty": (hk.BlockCausal(520, 3, 6), [[3, 4, 5]], [[3, 4, 5, -1, -1, -1, 0, 1, 2]], 12),
    "Wan's frames": (hk.BlockCausal(1560, 1, 3), [[9]], [[9, 7, -1, 8]], 2),
}


@pytest.fixture(autouse=True)
def hopper() -> None:
    """For all tests of modules that import it."""
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu needs a CUDA device, torch finds none", pytrace=False)
    lacking = gluon.unavailable(torch.device("cuda"))
    if lacking is not None and torch.cuda.get_device_capability() == (9, 0):
        pytest.fail(lacking, pytrace=False)  # a Hopper GPU whose kernel cannot run hides nothing
    if lacking is not None:
        pytest.skip(lacking)


def frames(*ids: list[list[int]]) -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ids]


def assert_one_graph_serves_every_block(call: Callable[[Tensor, Tensor], Tensor], slots: int) -> None:
    """Of ``call(q_frames, kv_frames)``: the ids change in place, and the captured graph sees what they say."""
    q_frames, kv_frames = frames([[0] * 3], [[0] * slots])
    call(q_frames, kv_frames)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(q_frames, kv_frames)
    for block in range(2):
        q_frames.copy_(torch.arange(3 * block, 3 * block + 3)[None])
        ids = torch.arange(slots, dtype=torch.int32)[None]
        kv_frames.copy_(torch.where(ids < 3 * block + 3, ids, -1))
        graph.replay()
        again = call(q_frames, kv_frames)
        torch.cuda.synchronize()
        assert torch.equal(out, again)
