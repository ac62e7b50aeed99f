"""The rings that keys and values are written to in 8 bits, as one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.dispatch import check_tensor
from ..common.float8 import E4M3, bits, padded
from ..qk_norm_rope.inputs import RopeInputs, check_places


@dataclass(frozen=True)
class Fp8Rings:
    """Destination of keys and values in 8 bits, in the order of the schema; see append_fp8.

    A schema has the caches as bytes: torch checks and compiles what it can compare.
    """

    slots: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scales: Tensor
    v_scales: Tensor
    rows: Tensor | None = None

    def as_schema(self) -> tuple[Any, ...]:
        """All but ``rows``, which comes last in a schema."""
        return self.slots, bits(self.k_cache), bits(self.v_cache), self.k_scales, self.v_scales

    @classmethod
    def of_schema(cls, slots: Tensor, k_cache: Tensor, v_cache: Tensor, *others: Any) -> Fp8Rings:
        """The inverse of :meth:`as_schema`, with ``rows``."""
        return cls(slots, k_cache.view(E4M3), v_cache.view(E4M3), *others)

    @property
    def copies(self) -> int:
        """How often each key is written."""
        return 1 if self.rows is None else len(self.rows)

    @property
    def num_slots(self) -> int:
        return self.v_cache.shape[1]

    def validate(self, op: str, device: torch.device, shape: Sequence[int], count: int) -> None:
        """Raise ValueError, in one line, unless they take keys [B, T, H, D] of this shape, in so many frames."""
        batch, tokens, heads, head_dim = shape
        check_places(op, self.slots, self.rows, batch, count)
        if count < 1 or tokens % count:
            raise ValueError(f"{op}: {tokens} tokens must be a multiple of the frames in slots, got {count}")
        tokens //= count
        for name, x, dtype in (
            ("k_cache", self.k_cache, E4M3), ("v_cache", self.v_cache, E4M3),
            ("k_scales", self.k_scales, torch.float32), ("v_scales", self.v_scales, torch.float32),
        ):  # fmt: skip
            check_tensor(op, name, x)
            if x.dtype != dtype:
                raise ValueError(f"{op}: {name} must be {dtype}, got {x.dtype}")
            if x.device != device:
                raise ValueError(f"{op}: {name} must be on {device} like the keys, got {x.device}")
        k, row = self.k_cache, batch if self.rows is None else "any"
        fits = k.dim() == 4 and k.shape[2:] == (heads, head_dim) and not k.shape[1] % tokens
        if not fits or (self.rows is None and k.shape[0] != batch):
            raise ValueError(f"{op}: k_cache must be [{row}, n * {tokens}, {heads}, {head_dim}], got {list(k.shape)}")
        slots = k.shape[1] // tokens
        scales = [k.shape[0], slots, heads]
        for name, x, legal in (
            ("v_cache", self.v_cache, [*scales, head_dim, padded(tokens)]),
            ("k_scales", self.k_scales, scales), ("v_scales", self.v_scales, scales),
        ):  # fmt: skip
            if list(x.shape) != legal:
                raise ValueError(f"{op}: {name} must be {legal} beside k_cache, got {list(x.shape)}")

    def validate_layout(self, op: str, keys: Tensor) -> None:
        """Reject what a kernel cannot write: ids elsewhere, strided channels or keys, overlapping rows, one memory for
        two.
        """
        for name, ids in (("slots", self.slots), ("rows", self.rows)):
            if ids is not None and ids.device != keys.device:
                raise ValueError(f"{op}: {name} must be on {keys.device} like the keys, got {ids.device}")
        named = {"k_cache": self.k_cache, "v_cache": self.v_cache, "k_scales": self.k_scales, "v_scales": self.v_scales}
        for name, x in named.items():
            if x.dtype == E4M3 and x.stride(-1) != 1:
                what = "channels" if name == "k_cache" else "keys"
                raise ValueError(f"{op}: {name} must have {what} of stride 1, got {x.stride(-1)}")
            if any(stride <= 0 for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
                raise ValueError(f"{op}: {name} must not overlap itself, got strides {list(x.stride())}")
        for k, v in (("k_cache", "v_cache"), ("k_scales", "v_scales")):
            if named[k].numel() and named[k].data_ptr() == named[v].data_ptr():
                raise ValueError(f"{op}: {k} and {v} must be apart, got the same memory")


def rope_from_schema(*arguments: Any) -> tuple[RopeInputs, Fp8Rings, bool]:
    """The arguments of ``hiar::qk_norm_rope_append_fp8``: inputs, rings, quantize_q."""
    tensors, rings, options, quantize_q, rows = (
        arguments[:4], arguments[4:9], arguments[9:14], arguments[14], arguments[15:],
    )  # fmt: skip
    return RopeInputs(*tensors, *options), Fp8Rings.of_schema(*rings, *rows), quantize_q


def empty_parts(k: Tensor, frames: int, parts: int) -> Tensor:
    """Memory for the largest |k| and |v| of so many parts of each frame and head: float32 [2, B, F, H, parts]."""
    return torch.empty(2, k.shape[0], frames, k.shape[2], parts, dtype=torch.float32, device=k.device)
