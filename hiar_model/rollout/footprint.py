"""Memory use of a rollout, counted on fake tensors; :mod:`hiar_model.planning.memory` adds it up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hiar_kernels import AttentionLayout

from ..models.kv_cache import CachedAttention
from ..models.transformer import HiARTransformer
from .batched_forward import BatchedForward
from .engine import Rollout


class _HostAttention(CachedAttention):
    """Computes what is visible on the host, with real numbers."""

    def prepare_host(self, starts: Sequence[int], layout: bool = True) -> AttentionLayout | None:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            return super().prepare_host(starts, layout)


def prompt_bytes(rollout: Rollout, model: HiARTransformer, prompt_embeds: Tensor) -> int:
    """Bytes of the cross-attention KV of an unpadded prompt in all layers; the rollout caches them."""
    cache = rollout._executor.prompt_cache
    cache.add(model, prompt_embeds, prompt_embeds)
    return sum(x.nbytes for kv in cache.get(model, [prompt_embeds]).layers for x in kv)


def forwards(rollout: Rollout, captured: bool) -> Iterator[BatchedForward]:
    """One forward of each kind in the rollout, prepared for fake tensors, not run.

    Args:
        captured: prepare as for CUDA graphs, which read the prompt from fixed buffers; nothing is captured.
    """
    executor = rollout._executor
    executor.attend = _HostAttention
    if captured:
        executor.capture = lambda run: run()
    seen: set[Any] = set()
    for forward in executor.prepared(rollout.warm_up_blocks):
        kind = (replace(forward.key, caches=(0, 0, 0)), forward.attend.layout)
        if kind not in seen:
            seen.add(kind)
            yield forward
