"""The visibility rule of block-causal attention against its definition."""

from __future__ import annotations

from random import Random

import naive
import pytest
import torch
from any_rule import any_ring, any_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import ids

from hiar_kernels import EMPTY, BlockCausal
from hiar_kernels.attention.mask import visible_with_context

pytestmark = pytest.mark.cpu

randoms = st.randoms(use_true_random=False)


@settings(max_examples=150, deadline=None)
@given(randoms)
def test_the_rule_is_its_definition(random: Random):
    rule, arguments, windows, frames = any_rule(random)
    shared = random.choice([True, False])  # one row of ids for the whole batch
    ring = [any_ring(random, frames) for _ in windows]
    ring = [ring[0]] * len(ring) if shared else [(r + [EMPTY] * len(frames))[: len(frames)] for r in ring]
    queries = [[random.choice(frames), random.choice(frames)] for _ in windows]
    expected = [
        [[naive.sees(q, k, window=w, **arguments) for k in row] for q in qs]
        for qs, row, w in zip(queries, ring, windows)
    ]
    seen = rule.visible(ids(*queries), ids(*(ring[:1] if shared else ring)), len(windows))
    assert seen.dtype == torch.bool
    assert seen.tolist() == expected
    long = rule.visible(ids(*queries).long(), ids(*ring).long(), len(windows))
    assert torch.equal(long, seen)


@settings(max_examples=100, deadline=None)
@given(randoms)
def test_the_rule_beside_a_context_is_its_definition(random: Random):
    rule, arguments, windows, frames = any_rule(random)
    own, context, queries = (any_ring(random, frames) for _ in range(3))
    queries = [q for q in queries if q != EMPTY] or frames[-1:]
    expected = [
        [
            [naive.sees_beside_context(q, k, of_context, window=w, **arguments) for of_context, k in keys]
            for q in queries
        ]
        for w in windows
        for keys in [[(True, k) for k in context] + [(False, k) for k in own]]
    ]
    seen = visible_with_context(rule, ids(queries), ids(own), ids(context), len(windows))
    assert seen.tolist() == expected


def test_the_rule_by_hand():
    """Window 6 with one sink frame: the block of frames 9 to 11 sees 0, 7, 8 and itself."""
    rule = BlockCausal(1, 3, window_frames=6, sink_frames=1)
    seen = rule.visible(ids([9, 10, 11]), ids(list(range(15))), 1)[0]
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0, 7, 8, 9, 10, 11]] * 3
    rule = BlockCausal(1, 3, window_frames=7, first_block_frames=2)
    seen = rule.visible(ids([0, 1, 2, 7]), ids(list(range(9))), 1)[0]
    wanted = [[0, 1], [0, 1], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]
    assert [row.nonzero().flatten().tolist() for row in seen] == wanted
    # the first block is frame 0 alone: an empty slot is no frame before it
    rule = BlockCausal(1, 3, first_block_frames=1)
    assert visible_with_context(rule, ids([0]), ids([0, EMPTY]), ids([EMPTY]), 1).tolist() == [[[False, True, False]]]
