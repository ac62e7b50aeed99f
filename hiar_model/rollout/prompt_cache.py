"""Cross-attention KV of the prompts in use: computed once per network and prompt, in fixed buffers for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.conditions import CrossAttentionKV
from ..models.transformer import HiARTransformer

_TILE = 16  # tokens: prompts are padded to a multiple, so that similar lengths have the same shape

PromptSource = Callable[[int], Tensor]
"""Block number -> prompt embeddings [B or 1, L, text_dim]; the same tensor object for the same prompt."""


@dataclass(frozen=True)
class ResumedPrompts:
    """Prompts of a resumed rollout: blocks that had started keep ``saved``, later ones take ``source``."""

    source: PromptSource
    saved: Mapping[int, Tensor]

    @classmethod
    def after(cls, source: PromptSource, copies: Mapping[int, Tensor]) -> ResumedPrompts:
        """Replace copies that equal a prompt of ``source`` by that very object, as in an uninterrupted run."""
        saved: dict[int, Tensor] = {}
        for block, copy in copies.items():
            known = [source(block), *saved.values()]
            saved[block] = next((one for one in known if _same(one, copy)), copy.to(known[0]))
        return cls(source, saved)

    def __call__(self, block: int) -> Tensor:
        saved = self.saved.get(block)
        return self.source(block) if saved is None else saved

    @property
    def forks(self) -> bool:
        """Whether ``source`` differs from the prompts of blocks that had started."""
        return any(self.source(block) is not saved for block, saved in self.saved.items())


@dataclass
class PromptCache:
    """``limit``: prompts, and stacks of prompts, that are cached."""

    limit: int
    entries: dict[tuple[int, int], tuple[Tensor, CrossAttentionKV]] = field(default_factory=dict)
    stacked: dict[tuple[int, ...], CrossAttentionKV] = field(default_factory=dict)

    def get(self, model: HiARTransformer, prompts: Sequence[Tensor], batch: int = 1) -> CrossAttentionKV:
        """KV of one prompt [B or 1, L, text_dim] per batch item, stacked to [items * B, ...]; [1, ...] if all batch
        items share one prompt of batch 1.
        """
        keys = [(id(model), id(prompt)) for prompt in prompts]
        for key, prompt in zip(keys, prompts, strict=True):
            if key not in self.entries:
                self.add(model, prompt, trim_padding(prompt))
        kvs = [self.entries[key][1] for key in keys]
        if len(set(keys)) == 1 and (len(kvs) == 1 or prompts[0].shape[0] == 1):
            result = kvs[0]
        else:
            name = tuple(id(kv) for kv in kvs)
            if name not in self.stacked:
                self.stacked[name] = _stack(kvs, batch)
            result = self.stacked[name]
        self._evict(set(keys))
        return result

    def add(self, model: HiARTransformer, prompt: Tensor, trimmed: Tensor) -> None:
        """Compute and store the KV of a prompt; ``trimmed`` is the prompt without padding."""
        self.entries[id(model), id(prompt)] = (prompt, _padded(model.cross_attention_kv(trimmed)))

    def _evict(self, used: set[tuple[int, int]]) -> None:
        while len(self.entries) > self.limit:
            oldest = next(key for key in self.entries if key not in used)
            del self.entries[oldest]
            self.stacked.clear()  # keyed by id() of entries, which may now be reused
        while len(self.stacked) > self.limit:
            del self.stacked[next(iter(self.stacked))]


@dataclass
class PromptBuffers:
    """Fixed buffers that captured graphs read the prompt from: one for each network and shape."""

    buffers: dict[tuple[int, tuple[int, ...]], CrossAttentionKV] = field(default_factory=dict)
    contents: dict[tuple[int, tuple[int, ...]], CrossAttentionKV] = field(default_factory=dict)

    def put(self, model: HiARTransformer, kv: CrossAttentionKV) -> CrossAttentionKV:
        """Copy a prompt's KV into the buffer of its shape, unless it is there already, and return the buffer."""
        key = (id(model), kv.shape)
        if key not in self.buffers:
            layers = tuple((k.clone(), v.clone()) for k, v in kv.layers)
            self.buffers[key], self.contents[key] = CrossAttentionKV(layers, kv.counts.clone(), counted=kv.counted), kv
        if self.contents[key] is not kv:
            buffer = self.buffers[key]
            buffer.counts.copy_(kv.counts)
            for (k, v), (new_k, new_v) in zip(buffer.layers, kv.layers, strict=True):
                k.copy_(new_k)
                v.copy_(new_v)
            self.contents[key] = kv
        return self.buffers[key]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def trim_padding(prompt: Tensor) -> Tensor:
    """Drop the trailing tokens of [B, L, D] that are zero for all B: padding, which the model counts instead."""
    used = prompt.abs().amax(dim=(0, 2)) != 0  # NaN stays: it is no padding, and the NaN guard names it
    return prompt[:, : int(used.nonzero()[-1]) + 1] if bool(used.any()) else prompt[:, :0]


def _pad(x: Tensor, length: int) -> Tensor:
    """x [B, L, ...] padded to ``length`` with zeros; a count of 0 hides a key."""
    if x.shape[1] == length:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], 1)


def _padded(kv: CrossAttentionKV) -> CrossAttentionKV:
    length = -(-kv.counts.shape[1] // _TILE) * _TILE
    layers = tuple((_pad(k, length), _pad(v, length)) for k, v in kv.layers)
    counted = kv.counted or length > kv.counts.shape[1]
    return CrossAttentionKV(layers, _pad(kv.counts, length), counted=counted)


def _stack(kvs: Sequence[CrossAttentionKV], batch: int) -> CrossAttentionKV:
    """KV of prompts of different lengths as one batch, ``batch`` samples for each."""
    joint = JointPrompt.stacked(kvs, [batch] * len(kvs))
    layers = tuple(joint.of(layer) for layer in range(len(kvs[0].layers)))
    return CrossAttentionKV(layers, joint.counts, counted=joint.counted)


@dataclass(frozen=True)
class JointPrompt(CrossAttentionKV):
    """Prompts of different lengths as one batch: stacked layer by layer when a layer asks, so that nothing is kept."""

    kvs: Sequence[CrossAttentionKV] = ()
    samples: Sequence[int] = ()

    @classmethod
    def stacked(cls, kvs: Sequence[CrossAttentionKV], samples: Sequence[int]) -> JointPrompt:
        """``samples``: how many of the batch each prompt [1 or that number, ...] is for; missing keys count 0 times."""
        length = max(kv.counts.shape[1] for kv in kvs)
        counts = torch.cat([_pad(kv.counts, length).expand(n, -1) for kv, n in zip(kvs, samples, strict=True)])
        uniform = all(kv.counts.shape[1] == length and not kv.counted for kv in kvs)
        return cls((), counts, None, not uniform, kvs, samples)

    def of(self, layer: int, kv: object = None) -> tuple[Tensor, Tensor]:
        """k, v [batch, L, H, D] of a layer."""
        length, layers = self.counts.shape[1], [kv.layers[layer] for kv in self.kvs]
        k, v = (
            torch.cat([_pad(x, length).expand(n, -1, -1, -1) for x, n in zip(xs, self.samples, strict=True)])
            for xs in zip(*layers, strict=True)
        )
        return k, v
