"""A task under torch.compile writes its rings where they lie: no temporary is as large as one ring."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import hiar_kernels
from hiar_kernels import BlockCausal
from hiar_kernels.common import triton_loader
from hiar_model.config import WanConfig
from hiar_model.models.cached_attention import CachedAttention
from hiar_model.models.conditions import OutputSelection
from hiar_model.models.kv_cache import RingCache

pytestmark = pytest.mark.cpu

CONFIG = WanConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=1, freq_dim=16, text_dim=8, text_len=6, in_channels=4, out_channels=4
)
GRID, WINDOW = (2, 3), 40
TOKENS = GRID[0] * GRID[1]
RING = WINDOW * TOKENS * CONFIG.dim  # numbers in the keys of one step
ALLOCATION = re.compile(r"empty_strided_\w+\(\(([\d, ]*)\)")


@pytest.fixture(autouse=True)
def through_the_ops(monkeypatch):
    """The path of a GPU: hiar ops, each opaque to the compiler; their references stand in for the kernels."""
    monkeypatch.setattr(triton_loader, "load", lambda op, tensor: None)
    with hiar_kernels.prefer("triton"), torch.no_grad():
        yield
    torch._dynamo.reset()


def largest_temporary(attend: CachedAttention, selection: OutputSelection | None = None, spoil: bool = False) -> int:
    """Numbers in the largest buffer that the code generated for one layer's task allocates."""
    rows = len(attend.frames)
    x, weight = torch.randn(rows, attend.frames.shape[1] * TOKENS, CONFIG.dim), torch.randn(CONFIG.dim, 3 * CONFIG.dim)
    norm, same = torch.ones(CONFIG.dim), torch.eye(CONFIG.head_dim)

    def task(x: Tensor, weight: Tensor, norm: Tensor) -> Tensor | None:
        if spoil:
            attend.cache.k[0] = attend.cache.k[0] @ same  # a product: needs no C++ compiler
        return attend(0, x @ weight, norm, norm, selection)

    with torch.compiler.config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(torch.compile(task, fullgraph=True), x, weight, norm)
    assert "hiar.qk_norm_rope_append" in code and "hiar.attention" in code
    sizes = [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in ALLOCATION.findall(code)]
    assert max(sizes, default=0) >= x.numel(), f"the product of x and the weight is not among the buffers {sizes}"
    return max(sizes)


def visit_of(steps: slice, frames: int) -> CachedAttention:
    """Of blocks of 3 frames, the first of them at the last of the steps."""
    cache = RingCache(CONFIG, (WINDOW,) * 3, 1, TOKENS)
    count = steps.stop - steps.start
    mask = BlockCausal(TOKENS, 3, (21,) * count)
    attend = CachedAttention(cache, steps, frames, [3] * count, GRID, 0, mask, [False] * count)
    attend.prepare_host([3 * i for i in reversed(range(count))], layout=False)
    attend.advance_device()
    return attend


@pytest.mark.parametrize(
    ("attend", "selection"),
    [
        (lambda: visit_of(slice(1, 2), 3), None),
        (lambda: visit_of(slice(0, 3), 3), None),
        (lambda: visit_of(slice(0, 3), 3), OutputSelection((0, 1))),
        (lambda: visit_of(slice(1, 2), 6), OutputSelection((0,), 3)),
    ],
    ids=["one", "three steps", "two of three live", "pair"],
)
def test_rings_are_written_in_place(attend, selection):
    actual = largest_temporary(attend(), selection)
    assert actual < RING, f"a temporary of {actual} numbers, a ring has {RING}"


def test_a_copy_of_the_ring_would_be_seen():
    assert largest_temporary(visit_of(slice(1, 2), 3), spoil=True) >= RING
