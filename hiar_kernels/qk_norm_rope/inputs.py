"""The arguments of one call of qk_norm_rope, or of qk_norm_rope_append, as one object."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Context, Decimal, localcontext
from typing import Any

import torch
from torch import Tensor

from ..common.dispatch import check_eps, check_floats, check_integers, is_number, is_whole


@dataclass(frozen=True)
class RopeInputs:
    """The arguments of ``hiar::qk_norm_rope`` in the order of its schema; height, width: tokens of a whole frame.

    ``cells`` (start, stop): which tokens of every frame qkv holds; None: all of them.
    """

    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    frames: Tensor
    num_heads: int
    height: int
    width: int
    eps: float
    theta: float
    cells: Sequence[int] | None = None

    def as_schema(self) -> tuple[Any, ...]:
        return (
            self.qkv, self.q_weight, self.k_weight, self.frames, self.num_heads, self.height, self.width, self.eps,
            self.theta, self.cells,
        )  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.qkv.shape[2] // 3 // self.num_heads

    @property
    def first_cell(self) -> int:
        return 0 if self.cells is None else self.cells[0]

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame in qkv: all, or those of ``cells``."""
        return self.height * self.width if self.cells is None else self.cells[1] - self.cells[0]

    @property
    def split_heads(self) -> tuple[int, int, int, int]:
        """[B, T, H, D], the shape of q and k."""
        batch, tokens, _ = self.qkv.shape
        return batch, tokens, self.num_heads, self.head_dim

    def validate(self, op: str) -> None:
        """Raise ValueError, in one line, if shapes or dtypes are wrong."""
        check_floats(op, qkv=self.qkv, q_weight=self.q_weight, k_weight=self.k_weight)
        check_integers(op, "frames", self.frames)
        check_eps(op, self.eps)
        if not is_number(self.theta) or not 0 < self.theta < math.inf:
            raise ValueError(f"{op}: theta must be a finite number above 0, got {self.theta!r}")
        cells, whole, heads = self.cells, self.height * self.width, self.num_heads
        if cells is not None and not (_are_whole(cells, 2) and 0 <= cells[0] < cells[1] <= whole):
            raise ValueError(f"{op}: cells must be (start, stop) with 0 <= start < stop <= {whole}, got {cells}")
        if self.qkv.dim() != 3:
            raise ValueError(f"{op}: qkv must be [B, T, 3 H D], got {list(self.qkv.shape)}")
        b, t, c = self.qkv.shape
        if not is_whole(heads):
            raise ValueError(f"{op}: num_heads must be a whole number of at least 1, got {heads!r}")
        if heads < 1 or c % (6 * heads):
            raise ValueError(f"{op}: width {c} of qkv is not 3 x {heads} heads of an even size")
        for name, w in (("q_weight", self.q_weight), ("k_weight", self.k_weight)):
            if w.shape != (c // 3,):
                raise ValueError(f"{op}: {name} must be [{c // 3}], got {list(w.shape)}")
        if self.frames.device != self.qkv.device:
            raise ValueError(f"{op}: frames must be on {self.qkv.device} like qkv, got {self.frames.device}")
        frames, tokens = self.frames, self.frame_tokens
        if frames.dim() != 2 or frames.shape[0] not in (1, b) or frames.shape[1] * tokens != t:
            raise ValueError(f"{op}: frames must be [{b} or 1, {t} / {tokens}], got {list(frames.shape)}")

    def on_device(self, op: str, **others: Tensor | None) -> RopeInputs:
        """Inputs for a kernel: dense channels of qkv; ids and ``others`` must be on its device."""
        for name, x in (("frames", self.frames), *others.items()):
            if x is not None and x.device != self.qkv.device:
                raise ValueError(f"{op}: {name} must be on {self.qkv.device} like qkv, got {x.device}")
        return self if self.qkv.stride(2) == 1 else replace(self, qkv=self.qkv.contiguous())


@dataclass(frozen=True)
class Rings:
    """Destination of keys and values: frame slots of caches [rows, S P, H, D]; see qk_norm_rope_append."""

    slots: Tensor
    k_cache: Tensor
    v_cache: Tensor
    rows: Tensor | None = None

    @property
    def copies(self) -> int:
        """How often each key is written."""
        return 1 if self.rows is None else len(self.rows)

    def validate(self, op: str, inputs: RopeInputs) -> None:
        """Raise ValueError, in one line, if shapes or dtypes are wrong."""
        check_floats(op, qkv=inputs.qkv, k_cache=self.k_cache, v_cache=self.v_cache)
        rows, batch = self.rows, inputs.qkv.shape[0]
        check_places(op, self.slots, rows, batch, inputs.frames.shape[1])
        heads, head_dim, tokens = inputs.num_heads, inputs.head_dim, inputs.frame_tokens
        for name, cache in (("k_cache", self.k_cache), ("v_cache", self.v_cache)):
            fits = cache.dim() == 4 and cache.shape[2:] == (heads, head_dim) and not cache.shape[1] % tokens
            if not fits or (rows is None and cache.shape[0] != batch):
                legal = f"[{batch if rows is None else 'any'}, n * {tokens}, {heads}, {head_dim}]"
                raise ValueError(f"{op}: {name} must be {legal}, got {list(cache.shape)}")
        k, v = self.k_cache, self.v_cache
        one = not torch.compiler.is_compiling() and torch._C._is_alias_of(k, v)  # type: ignore[attr-defined]
        if one and k.storage_offset() == v.storage_offset() and k.numel() > 0:
            raise ValueError(f"{op}: k_cache and v_cache must be apart, got the same memory")

    def validate_layout(self, op: str) -> None:
        """Reject caches that a kernel cannot write: strided channels, overlapping rows, unequal sizes."""
        k, v = self.k_cache, self.v_cache
        for name, cache in (("k_cache", k), ("v_cache", v)):
            if cache.stride(3) != 1:
                raise ValueError(f"{op}: {name} must have channels of stride 1, got {cache.stride(3)}")
            if any(stride <= 0 for stride, size in zip(cache.stride(), cache.shape, strict=True) if size > 1):
                raise ValueError(f"{op}: {name} must not overlap itself, got strides {list(cache.stride())}")
        if k.shape != v.shape:
            raise ValueError(f"{op}: v_cache must be {list(k.shape)} like k_cache, got {list(v.shape)}")


def check_places(op: str, slots: Tensor, rows: Tensor | None, batch: int, count: int) -> None:
    """Raise ValueError unless slots, and rows if any, say where so many frames of a batch go in a ring."""
    check_integers(op, "slots", slots)
    if rows is not None:
        check_integers(op, "rows", rows)
        if rows.dim() != 2 or rows.shape[0] not in (1, 2) or rows.shape[1] != batch:
            raise ValueError(f"{op}: rows must be [1 or 2, {batch}], got {list(rows.shape)}")
    fits = slots.dim() == 2 if rows is None else slots.dim() == 3 and slots.shape[0] == rows.shape[0]
    if not fits or slots.shape[-2] not in (1, batch) or slots.shape[-1] != count:
        copies = "" if rows is None else f"{rows.shape[0]}, "
        raise ValueError(f"{op}: slots must be [{copies}{batch} or 1, {count}], got {list(slots.shape)}")


def _are_whole(numbers: object, count: int) -> bool:
    """Whether it is a sequence of so many whole numbers."""
    return isinstance(numbers, Sequence) and len(numbers) == count and all(is_whole(number) for number in numbers)


def token_grid(op: str, grid: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of tokens of a frame; ValueError for what is none."""
    if not _are_whole(grid, 2) or min(grid) < 1:
        raise ValueError(f"{op}: grid must be (rows, columns) of at least 1, got {grid!r}")
    return grid[0], grid[1]


def append_as_schema(inputs: RopeInputs, rings: Rings) -> tuple[Any, ...]:
    """The arguments of ``hiar::qk_norm_rope_append``."""
    tensors, options = inputs.as_schema()[:4], inputs.as_schema()[4:]
    return (*tensors, rings.slots, rings.k_cache, rings.v_cache, *options, rings.rows)


def append_from_schema(*arguments: Any) -> tuple[RopeInputs, Rings]:
    """The inverse of :func:`append_as_schema`."""
    tensors, (slots, k_cache, v_cache), options = arguments[:4], arguments[4:7], arguments[7:13]
    return RopeInputs(*tensors, *options), Rings(slots, k_cache, v_cache, *arguments[13:])


def empty_like_q(inputs: RopeInputs) -> Tensor:
    return torch.empty(inputs.split_heads, dtype=inputs.qkv.dtype, device=inputs.qkv.device)


def as_ids(x: Tensor) -> Tensor:
    """Ids as the kernels of csrc/ read them: int32 or int64."""
    return x if x.dtype in (torch.int32, torch.int64) else x.long()


_FULL_TURN = Decimal("6.283185307179586476925286766559005768394338798750211641949889")


@functools.cache  # never evicted: captured graphs read it
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
