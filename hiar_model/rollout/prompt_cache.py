"""Keys and values of the prompts in use: computed once per weights and prompt, kept where captured graphs find them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.conditions import CrossAttentionKV
from ..models.transformer import HiARTransformer

_TILE = 16  # keys: texts of about the same length then have the same shape

TextSource = Callable[[int], Tensor]
"""Of a block number: the same tensor object for the same prompt."""


@dataclass(frozen=True)
class ResumedPrompts:
    """The texts of a rollout that goes on: blocks that had begun keep theirs, later ones get ``given``."""

    given: TextSource
    kept: Mapping[int, Tensor]

    @classmethod
    def after(cls, given: TextSource, saved: Mapping[int, Tensor]) -> ResumedPrompts:
        """``saved`` are copies: where a given text is the same, that very object stands in, as without a break."""
        kept: dict[int, Tensor] = {}
        for block, text in saved.items():
            known = [given(block), *kept.values()]
            kept[block] = next((one for one in known if _same(one, text)), text.to(known[0]))
        return cls(given, kept)

    def __call__(self, block: int) -> Tensor:
        found = self.kept.get(block)
        return self.given(block) if found is None else found

    @property
    def forks(self) -> bool:
        """Whether the texts given differ from those of blocks that had begun."""
        return any(self.given(block) is not text for block, text in self.kept.items())


@dataclass
class PromptCache:
    """``limit``: prompts, and stacks of prompts, that are kept."""

    limit: int
    entries: dict[tuple[int, int], tuple[Tensor, CrossAttentionKV]] = field(default_factory=dict)
    stacked: dict[tuple[int, ...], CrossAttentionKV] = field(default_factory=dict)

    def get(self, model: HiARTransformer, texts: Sequence[Tensor], batch: int = 1) -> CrossAttentionKV:
        """For one row a text [B or 1, ...]: [rows * B, ...]; [1, ...] where all rows share one text of batch 1."""
        keys = [(id(model), id(text)) for text in texts]
        for key, text in zip(keys, texts, strict=True):
            if key not in self.entries:
                self.hold(model, text, trim_padding(text))
        parts = [self.entries[key][1] for key in keys]
        shared = len(set(keys)) == 1
        if shared and (len(parts) == 1 or texts[0].shape[0] == 1):
            found = parts[0]
        else:
            name = tuple(id(part) for part in parts)
            if name not in self.stacked:
                self.stacked[name] = _stack(parts, batch)
            found = self.stacked[name]
        self._forget(set(keys))
        return found

    def hold(self, model: HiARTransformer, text: Tensor, trimmed: Tensor) -> None:
        """Make the keys of a text of which ``trimmed`` is all that is no padding."""
        self.entries[id(model), id(text)] = (text, _padded(model.cross_attention_kv(trimmed)))

    def _forget(self, used: set[tuple[int, int]]) -> None:
        while len(self.entries) > self.limit:
            oldest = next(key for key in self.entries if key not in used)
            del self.entries[oldest]
            self.stacked.clear()  # its keys are identities of what was just freed
        while len(self.stacked) > self.limit:
            del self.stacked[next(iter(self.stacked))]


@dataclass
class PromptBuffers:
    """Fixed places for texts, which captured graphs read: another prompt of the same shape is copied there."""

    places: dict[tuple[int, tuple[int, ...]], CrossAttentionKV] = field(default_factory=dict)
    holds: dict[tuple[int, tuple[int, ...]], CrossAttentionKV] = field(default_factory=dict)

    def put(self, model: HiARTransformer, text: CrossAttentionKV) -> CrossAttentionKV:
        """The place of such texts, which now holds this one."""
        key = (id(model), text.shape)
        if key not in self.places:
            layers = tuple((k.clone(), v.clone()) for k, v in text.layers)
            self.places[key], self.holds[key] = (
                CrossAttentionKV(layers, text.counts.clone(), counted=text.counted),
                text,
            )
        if self.holds[key] is not text:
            place = self.places[key]
            place.counts.copy_(text.counts)
            place.log_counts.copy_(text.log_counts)
            for (k, v), (new_k, new_v) in zip(place.layers, text.layers, strict=True):
                k.copy_(new_k)
                v.copy_(new_v)
            self.holds[key] = text
        return self.places[key]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def trim_padding(text: Tensor) -> Tensor:
    """Drop trailing zero tokens that every row of [B, L, D] has: padding, which the model counts instead."""
    used = text.abs().amax(dim=(0, 2)) > 0
    return text[:, : int(used.nonzero()[-1]) + 1] if bool(used.any()) else text[:, :0]


def _fill(x: Tensor, length: int) -> Tensor:
    """x [B, L, ...] with zeros up to a length: as counts they hide the keys."""
    return torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], 1)


def _padded(text: CrossAttentionKV) -> CrossAttentionKV:
    length = -(-text.counts.shape[1] // _TILE) * _TILE
    layers = tuple((_fill(k, length), _fill(v, length)) for k, v in text.layers)
    counted = text.counted or length > text.counts.shape[1]
    return CrossAttentionKV(layers, _fill(text.counts, length), counted=counted)


def _stack(parts: Sequence[CrossAttentionKV], batch: int) -> CrossAttentionKV:
    """Texts of different lengths as rows of one batch, ``batch`` for each: the missing keys count 0 times."""
    length = max(part.counts.shape[1] for part in parts)
    layers = []
    for layer in zip(*(part.layers for part in parts), strict=True):
        k, v = (
            torch.cat([_fill(x, length).expand(batch, -1, -1, -1) for x in kind]) for kind in zip(*layer, strict=True)
        )
        layers.append((k, v))
    counts = [_fill(part.counts, length).expand(batch, -1) for part in parts]
    alike = all(part.counts.shape[1] == length and not part.counted for part in parts)
    return CrossAttentionKV(tuple(layers), torch.cat(counts), counted=not alike)
