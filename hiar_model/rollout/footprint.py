"""Memory use of a rollout, counted on meta tensors; :mod:`hiar_model.planning.memory` adds it up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..models.transformer import HiARTransformer
from .batched_forward import BatchedForward
from .engine import Rollout


def prompt_bytes(rollout: Rollout, model: HiARTransformer, prompt_embeds: Tensor) -> int:
    """Bytes of the cross-attention KV of an unpadded prompt in all layers; the rollout caches them."""
    cache = rollout._executor.prompt_cache
    cache.add(model, prompt_embeds, prompt_embeds)
    return sum(x.nbytes for kv in cache.get(model, [prompt_embeds]).layers for x in kv)


def forwards(rollout: Rollout, captured: bool) -> Iterator[BatchedForward]:
    """One forward of each kind in the rollout, prepared for meta tensors, not run: of the many that differ only in how
    much of the past they see, the one that sees the most.

    Args:
        captured: prepare as for CUDA graphs, which read the prompt from fixed buffers; nothing is captured.
    """
    executor = rollout._executor
    if captured:
        executor.capture = lambda run: run()
    largest: dict[Any, tuple[tuple[int, int], int]] = {}
    for number, forward in enumerate(executor.prepared(rollout.warm_up_blocks)):
        kind, visible = _kind(forward)
        if kind not in largest or visible > largest[kind][0]:
            largest[kind] = visible, number
    executor.cache.reset()
    chosen = {number for _, number in largest.values()}
    for number, forward in enumerate(executor.prepared(rollout.warm_up_blocks)):
        if number in chosen:
            yield forward


def _kind(forward: BatchedForward) -> tuple[Any, tuple[int, int]]:
    """What tells apart forwards of other work, and the visible slots of a group of queries (the most) and of all."""
    key, layout = replace(forward.key, caches=(0, 0, 0), layout=None), forward.attend.layout
    if layout is None:
        return key, (0, 0)
    runs = tuple(tuple((len(group.context), len(group.own)) for group in row) for row in layout.rows)
    slots = [sum(b - a for a, b in (*group.context, *group.own)) for row in layout.rows for group in row]
    return (key, runs), (max(slots), sum(slots))
