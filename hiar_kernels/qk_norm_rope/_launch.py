"""What the launchers of qk_norm_rope share: the table of angles and the checks of what they are given."""

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


def checked(op: str, qkv: Tensor, **others: Tensor) -> Tensor:
    """qkv with adjacent channels; the others must be where it is."""
    for name, x in others.items():
        if x.device != qkv.device:
            raise ValueError(f"{op}: {name} must be on {qkv.device} like qkv, got {x.device}")
    return qkv if qkv.stride(2) == 1 else qkv.contiguous()


def check_rings(op: str, k_cache: Tensor, v_cache: Tensor) -> None:
    """Refuse rings that a kernel cannot write: channels apart, rows in one place, two sizes, one memory for both."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1:
            raise ValueError(f"{op}: {name} must have channels of stride 1, got {cache.stride(3)}")
        apart = all(stride > 0 for stride, size in zip(cache.stride(), cache.shape, strict=True) if size > 1)
        if not apart:
            raise ValueError(f"{op}: {name} must not overlap itself, got strides {list(cache.stride())}")
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"{op}: v_cache must be {list(k_cache.shape)} like k_cache, got {list(v_cache.shape)}")
    same = k_cache.numel() > 0 and k_cache.data_ptr() == v_cache.data_ptr()
    if same:
        raise ValueError(f"{op}: k_cache and v_cache must be apart, got the same memory")
