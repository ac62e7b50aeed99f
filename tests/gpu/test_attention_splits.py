"""``num_splits`` by the libraries of torch on the device: error budget, poisoned slots, captured graphs."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget

from hiar_kernels import BlockCausal, attention, attention_layout, attention_with_lse, reference
from hiar_kernels.common.dispatch import taken

pytestmark = pytest.mark.gpu

TOKENS, HEADS, DIM = 130, 3, 128
RINGS = {  # sink frames, slots of a ring that queries 9..11 see with a window of 8
    "all of it": (0, [8, 9, 10, 11, 4, 5, 6, 7]),
    "an odd number": (0, [5, 6, 7, 8, 9, 10, 11, -1]),
    "two equal runs": (0, [9, 10, 11, -1, 6, 7, 8, -1]),
    "a sink": (1, [0, -1, 6, 7, 8, 9, 10, 11]),
}


def build(name: str, device: str = "cuda"):
    sink, ring = RINGS[name]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n * TOKENS, HEADS, DIM, generator=g).to(torch.bfloat16) for n in (3, 8, 8))
    hidden = torch.tensor(ring).repeat_interleave(TOKENS) < 0
    k[:, hidden] = v[:, hidden] = torch.nan
    mask, ids = BlockCausal(TOKENS, 3, 8, sink), [torch.tensor([x], dtype=torch.int32) for x in ([9, 10, 11], ring)]
    options = {"mask": mask, "q_frames": ids[0].to(device), "kv_frames": ids[1].to(device)}
    return [x.to(device) for x in (q, k, v)], {**options, "layout": attention_layout(mask, *ids)}


@pytest.mark.parametrize("num_splits", [1, 2, 3])
@pytest.mark.parametrize("impl", ["cudnn", "flash"])
@pytest.mark.parametrize("name", RINGS)
def test_splits_keep_the_error_budget(name, impl, num_splits, device="cuda"):
    qkv, options = build(name, device)
    oracle = {key: x for key, x in options.items() if key != "layout"}
    found, lse = attention_with_lse(*qkv, **options, impl=impl, num_splits=num_splits)
    exact, exact_lse = reference.attention_with_lse(*(x.double() for x in qkv), **oracle)
    eager = reference.attention(*qkv, **oracle)
    assert_within_budget(found, eager, exact, f"{impl} in {num_splits}")
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RINGS)
def test_splits_in_a_captured_graph(name):
    """Nothing is read from the device, the merge is a kernel, and a replay has the bits of the eager call."""
    qkv, options = build(name)
    wanted = attention(*qkv, **options, impl="cudnn", num_splits=2)
    graph = torch.cuda.CUDAGraph()
    with taken() as ran, torch.cuda.graph(graph):
        out = attention(*qkv, **options, impl="cudnn", num_splits=2)
    assert [impl for op, impl in ran if op == "merge_attention"] in (["triton"], ["cuda"])
    graph.replay()
    assert torch.equal(out, wanted)
