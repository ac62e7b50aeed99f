"""Rings of 8-bit keys and values, and what they hold in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import hiar_kernels as hk
from hiar_kernels.common.float8 import pack_values, quantize_frames


@dataclass(frozen=True)
class Ring:
    """Arguments of attention_fp8 that describe a ring, and ``exact``: keys and values [B, S P, H, D] in float64."""

    k: Tensor
    v: Tensor
    k_scales: Tensor
    v_scales: Tensor
    exact: tuple[Tensor, Tensor]

    @classmethod
    def random(cls, batch: int, slots: int, tokens: int, heads: int, width: int, seed: int = 0) -> Ring:
        random = torch.Generator().manual_seed(seed)
        sizes = 1 + torch.arange(slots)[:, None, None, None]  # so that every slot has another scale
        new = [torch.randn(batch, slots, tokens, heads, width, generator=random) * sizes / slots for _ in "kv"]
        (k, k_scales), (v, v_scales) = (quantize_frames(x) for x in new)
        exact = [x.double() * s.double()[:, :, None, :, None] for x, s in ((k, k_scales), (v, v_scales))]
        rings = k.flatten(1, 2), pack_values(v), k_scales, v_scales
        return cls(*rings, tuple(x.flatten(1, 2) for x in exact))  # type: ignore[arg-type]

    def without(self, slot: int, tokens: int) -> Ring:
        """NaN in a slot."""
        k, v, k_scales, v_scales = (x.clone() for x in self.arguments)
        k[:, slot * tokens : (slot + 1) * tokens], v[:, slot] = torch.nan, torch.nan
        k_scales[:, slot] = v_scales[:, slot] = torch.nan
        return replace(self, k=k, v=v, k_scales=k_scales, v_scales=v_scales)

    def to(self, device: torch.device) -> Ring:
        k, v, k_scales, v_scales = (x.to(device) for x in self.arguments)
        return replace(self, k=k, v=v, k_scales=k_scales, v_scales=v_scales)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k, self.v, self.k_scales, self.v_scales


def queries(batch: int, length: int, heads: int, width: int, seed: int = 1) -> Tensor:
    """Peaked enough that the highest score moves from block to block."""
    return 3 * torch.randn(batch, length, heads, width, generator=torch.Generator().manual_seed(seed))


def exactly(q: Tensor, ring: Ring, q_scales: Tensor | None = None, **ids) -> Tensor:
    """In float64, of the numbers that the 8 bits stand for; where q is."""
    wide = q.double() if q_scales is None else q.double() * q_scales.double()[..., None]
    k, v = (torch.where(x.isfinite(), x, 0).to(q.device) for x in ring.exact)
    return hk.reference.attention(wide, k, v, **ids)
