"""Keys and values of the prompts in use: computed once per weights and prompt, kept where captured graphs find them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..transformer import HiARTransformer, TextKV

_TILE = 16  # keys: texts of about the same length then have the same shape


@dataclass
class TextCache:
    """``limit``: prompts, and stacks of prompts, that are kept."""

    limit: int
    entries: dict[tuple[int, int], tuple[Tensor, TextKV]] = field(default_factory=dict)
    stacked: dict[tuple[int, ...], TextKV] = field(default_factory=dict)

    def get(self, model: HiARTransformer, texts: Sequence[Tensor]) -> TextKV:
        """For one row a text: [rows * B, ...]; [1, ...] where all rows share one text of batch 1."""
        keys = [(id(model), id(text)) for text in texts]
        for key, text in zip(keys, texts, strict=True):
            if key not in self.entries:
                self.entries[key] = (text, _padded(model.text_kv(trim_padding(text))))
        parts = [self.entries[key][1] for key in keys]
        shared = len(set(keys)) == 1
        if shared and (len(parts) == 1 or texts[0].shape[0] == 1):
            found = parts[0]
        else:
            name = tuple(id(part) for part in parts)
            if name not in self.stacked:
                self.stacked[name] = _stack(parts)
            found = self.stacked[name]
        self._forget(set(keys))
        return found

    def _forget(self, used: set[tuple[int, int]]) -> None:
        while len(self.entries) > self.limit:
            oldest = next(key for key in self.entries if key not in used)
            del self.entries[oldest]
            self.stacked.clear()  # its keys are identities of what was just freed
        while len(self.stacked) > self.limit:
            del self.stacked[next(iter(self.stacked))]


@dataclass
class TextSlots:
    """Fixed places for texts, which captured graphs read: another prompt of the same shape is copied there."""

    places: dict[tuple[int, tuple[int, ...]], TextKV] = field(default_factory=dict)
    holds: dict[tuple[int, tuple[int, ...]], TextKV] = field(default_factory=dict)

    def put(self, model: HiARTransformer, text: TextKV) -> TextKV:
        """The place of such texts, which now holds this one."""
        key = (id(model), text.shape)
        if key not in self.places:
            layers = tuple((k.clone(), v.clone()) for k, v in text.layers)
            self.places[key], self.holds[key] = TextKV(layers, text.counts.clone()), text
        if self.holds[key] is not text:
            place = self.places[key]
            place.counts.copy_(text.counts)
            for (k, v), (new_k, new_v) in zip(place.layers, text.layers, strict=True):
                k.copy_(new_k)
                v.copy_(new_v)
            self.holds[key] = text
        return self.places[key]


def trim_padding(text: Tensor) -> Tensor:
    """Drop trailing zero tokens that every row of [B, L, D] has: padding, which the model counts instead."""
    used = text.abs().amax(dim=(0, 2)) > 0
    return text[:, : int(used.nonzero()[-1]) + 1] if bool(used.any()) else text[:, :0]


def _fill(x: Tensor, length: int) -> Tensor:
    """x [B, L, ...] with zeros up to a length: as counts they hide the keys."""
    return torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], 1)


def _padded(text: TextKV) -> TextKV:
    length = -(-text.counts.shape[1] // _TILE) * _TILE
    layers = tuple((_fill(k, length), _fill(v, length)) for k, v in text.layers)
    return TextKV(layers, _fill(text.counts, length))


def _stack(parts: Sequence[TextKV]) -> TextKV:
    """Texts of different lengths as rows of one batch: the missing keys count 0 times."""
    length = max(part.counts.shape[1] for part in parts)
    layers = []
    for layer in zip(*(part.layers for part in parts), strict=True):
        k, v = (torch.cat([_fill(x, length) for x in kind]) for kind in zip(*layer, strict=True))
        layers.append((k, v))
    counts = [_fill(part.counts, length).expand(part.layers[0][0].shape[0], -1) for part in parts]
    return TextKV(tuple(layers), torch.cat(counts))
