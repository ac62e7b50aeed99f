"""Cached keys and values of prompts: what is padding, what is evicted, what is the same prompt."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_model import MODEL, TEXT, TINY

from hiar_model.rollout.prompt_cache import PromptCache, ResumedPrompts, trim_padding

pytestmark = pytest.mark.cpu

PROMPTS = [TEXT + n for n in range(4)]


def test_padding_is_what_is_zero_in_all_of_a_batch():
    prompts = torch.zeros(2, TINY.text_len, TINY.text_dim)
    prompts[0, 0], prompts[1, 2, 3] = 1.0, -1.0
    assert trim_padding(prompts).shape[1] == 3
    assert trim_padding(torch.zeros_like(prompts)).shape[1] == 0


def test_nan_is_no_padding():
    """Of a text encoder that failed: else the video would be one without a prompt."""
    prompts = torch.zeros(1, TINY.text_len, TINY.text_dim)
    prompts[0, 1, 0] = torch.nan
    assert trim_padding(prompts).shape[1] == 2


def test_prompts_in_use_are_never_evicted():
    cache = PromptCache(limit=2)
    first, second, third, _ = PROMPTS
    cache.get(MODEL, [first])
    cache.get(MODEL, [second])
    cache.get(MODEL, [first, third])
    assert [one for one, _ in cache.entries.values()] == [first, third]


def test_stacks_of_prompts_stay_few_and_of_prompts_that_are_cached():
    """They are looked up by id(), which a later prompt may have again."""
    cache = PromptCache(limit=3)
    for chosen in (*itertools.product(PROMPTS[:3], repeat=3), *itertools.product(PROMPTS, repeat=3)):
        cache.get(MODEL, chosen)
        cached = {id(kv) for _, kv in cache.entries.values()}
        assert len(cache.entries) <= 3 and len(cache.stacked) <= 3
        assert all(cached.issuperset(ids) for ids in cache.stacked)


def test_a_prompt_of_another_dtype_is_another_one():
    prompts = ResumedPrompts.after(lambda block: TEXT, {0: TEXT.double(), 1: TEXT.clone()})
    assert prompts(1) is TEXT and prompts(0) is not TEXT and prompts(0).dtype == TEXT.dtype and prompts.forks
