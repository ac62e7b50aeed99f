"""What the launchers of qk_norm_rope share: the table of angles."""

from __future__ import annotations

import functools
from decimal import Context, Decimal, localcontext

import torch
from torch import Tensor

_FULL_TURN = Decimal("6.283185307179586476925286766559005768394338798750211641949889")


@functools.lru_cache(maxsize=64)
def turns_of(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """int64 [head_dim / 2]: the turns of each pair for one step along its axis, modulo 1, in units of 2^-64."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("qk_norm_rope: first call for this head size and theta; run it once before graph capture")
    pairs = head_dim // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    with localcontext(Context(prec=60)):
        base = Decimal(theta)
        units = [round(base ** (Decimal(-i) / n) / _FULL_TURN * 2**64) for n in split for i in range(n)]
    return torch.tensor([(u + 2**63) % 2**64 - 2**63 for u in units], dtype=torch.int64, device=device)
