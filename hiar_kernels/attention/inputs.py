"""The arguments of one attention call as one object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.dispatch import check_floats, check_tensor, differentiated, is_number, require, require_no_gradient
from .layout import AttentionLayout
from .mask import BlockCausal, KVContext

TRITON_HEAD_DIMS = (16, 32, 64, 128)
LARGEST_FRAME = 2**30  # exclusive, in kernels: sums of two ids and a window stay within 32 bits
_UNBOUNDED = -1  # "no window" in the schema's int list


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of one call; the fields are the arguments of :func:`hiar_kernels.attention`. scale None: 1 / sqrt(D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockCausal | None = None
    q_frames: Tensor | None = None
    kv_frames: Tensor | None = None
    context: KVContext | None = None
    kv_counts: Tensor | None = None
    scale: float | None = None

    @property
    def softmax_scale(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def needs_grad(self) -> bool:
        return differentiated(*self.differentiable)

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """The tensors that may receive a gradient."""
        return (self.q, self.k, self.v) if self.context is None else (self.q, self.k, self.v, *self.context.kv)

    def as_schema(self) -> tuple[Any, ...]:
        """The arguments of ``hiar::attention``. A mask is five integers and the window of each batch item."""
        rule: list[int] = []
        windows: list[int] = []
        mask, context = self.mask, self.context
        if mask is not None:
            rule, windows = rule_of(mask), window_list(mask, self.q.shape[0])
        context_k, context_v, context_frames = (
            (None, None, None) if context is None else (context.k, context.v, context.frames)
        )
        return (
            self.q, self.k, self.v, context_k, context_v, self.q_frames, self.kv_frames, context_frames, self.kv_counts,
            rule, windows, self.softmax_scale,
        )  # fmt: skip

    @classmethod
    def from_schema(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context_k: Tensor | None,
        context_v: Tensor | None,
        q_frames: Tensor | None,
        kv_frames: Tensor | None,
        context_frames: Tensor | None,
        kv_counts: Tensor | None,
        rule: Sequence[int],
        windows: Sequence[int],
        scale: float | None,
    ) -> AttentionInputs:
        """The inverse of :meth:`as_schema`."""
        mask = context = None
        if rule:
            mask = mask_of(rule, windows)
        if context_k is not None and context_v is not None and context_frames is not None:
            context = KVContext(context_k, context_v, context_frames)
        return cls(q, k, v, mask, q_frames, kv_frames, context, kv_counts, scale)

    def validate(self) -> None:
        """Raise ValueError, in one line, if shapes, dtypes, devices or ids are wrong."""
        q, k, mask, context, kv_counts = self.q, self.k, self.mask, self.context, self.kv_counts
        if mask is not None and not isinstance(mask, BlockCausal):
            actual = f"a tensor {list(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
            actual = actual if "\n" not in actual and len(actual) <= 60 else type(mask).__name__
            legal = "None or BlockCausal(frame_tokens, frames_per_block, ...): who sees whom goes by frame ids"
            raise ValueError(f"attention: mask must be {legal}; got {actual}")
        if self.scale is not None and (not is_number(self.scale) or not -math.inf < self.scale < math.inf):
            raise ValueError(f"attention: scale must be a finite number, or None for 1 / sqrt(D), got {self.scale!r}")
        if context is not None and not isinstance(context, KVContext):
            raise ValueError(f"attention: context must be None or a KVContext, got {type(context).__name__}")
        check_floats("attention", q=q)
        for name in ("k", "v", "q_frames", "kv_frames", "kv_counts"):
            if name in "kv" or getattr(self, name) is not None:
                check_tensor("attention", name, getattr(self, name))
        if q.dim() != 4:
            raise ValueError(f"attention: q must be [B, Tq, H, D], got {list(q.shape)}")
        b, _, h, d = q.shape
        tensors = [("k", k, k), ("v", self.v, k)]
        if context is not None:
            require(mask is not None, "attention: context needs a BlockCausal mask, got mask=None")
            for name, part in (("k", context.k), ("v", context.v), ("frames", context.frames)):
                check_tensor("attention: context", name, part)
            tensors += [("context.k", context.k, context.k), ("context.v", context.v, context.k)]
        for name, x, like in tensors:
            length = like.shape[1] if like.dim() == 4 else "Tk"
            if x.dim() != 4 or x.shape != (b, length, h, d):
                raise ValueError(f"attention: {name} must be [{b}, {length}, {h}, {d}], got {list(x.shape)}")
            if x.dtype != q.dtype:
                raise ValueError(f"attention: {name} must be {q.dtype} like q, got {x.dtype}")
            if x.device != q.device:
                raise ValueError(f"attention: {name} must be on {q.device} like q, got {x.device}")
        if mask is None:
            no_ids = self.q_frames is None and self.kv_frames is None
            require(no_ids, "attention: frame ids need a BlockCausal mask, got mask=None")
            if kv_counts is not None and (
                kv_counts.dim() != 2 or kv_counts.shape[0] not in (1, b) or kv_counts.shape[1] != k.shape[1]
            ):
                raise ValueError(f"attention: kv_counts must be [{b} or 1, {k.shape[1]}], got {list(kv_counts.shape)}")
            require_no_gradient("attention", "kv_counts have no gradient; detach them", kv_counts)
            return
        require(kv_counts is None, "attention: kv_counts needs mask=None")
        mask.windows(b)
        tokens = mask.frame_tokens
        lengths = [("q", q, self.q_frames, "q_frames"), ("k", k, self.kv_frames, "kv_frames")]
        if context is not None:
            lengths.append(("context.k", context.k, context.frames, "context.frames"))
        for name, x, frames, ids in lengths:
            if x.shape[1] % tokens:
                raise ValueError(f"attention: {name} has {x.shape[1]} tokens, no multiple of frame_tokens {tokens}")
            if frames is None:
                continue
            slots = x.shape[1] // tokens
            if frames.dim() != 2 or frames.shape[0] not in (1, b) or frames.shape[1] != slots:
                raise ValueError(f"attention: {ids} must be [{b} or 1, {slots}], got {list(frames.shape)}")
            if frames.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"attention: {ids} must be int32 or int64, got {frames.dtype}")
            if frames.device != q.device:
                raise ValueError(f"attention: {ids} must be on {q.device} like q, got {frames.device}")

    def validate_layout(self, layout: AttentionLayout) -> None:
        """Reject a layout of other lengths, with which a library would read past the keys."""
        mask, context = self.mask, self.context
        require(mask is not None, "attention: layout needs the BlockCausal mask that it was made of, got mask=None")
        assert mask is not None
        tokens = mask.frame_tokens
        if layout.frame_tokens != tokens or len(layout.rows) not in (1, self.q.shape[0]):
            raise ValueError(
                f"attention: layout is of {layout.frame_tokens} frame_tokens and {len(layout.rows)} rows, the mask of "
                f"{tokens} and q of {self.q.shape[0]}"
            )
        slots = {"queries": self.q.shape[1] // tokens, "own keys": self.k.shape[1] // tokens}
        slots["context keys"] = 0 if context is None else context.k.shape[1] // tokens
        for groups in layout.rows:
            reach = {
                "queries": groups[-1].queries[1] if groups else 0,
                "own keys": max((g.own[-1][1] for g in groups if g.own), default=0),
                "context keys": max((g.context[-1][1] for g in groups if g.context), default=0),
            }
            for name, last in reach.items():
                if last > slots[name] or (name == "queries" and last != slots[name]):
                    raise ValueError(f"attention: layout has {last} slots of {name}, there are {slots[name]}")


def window_list(mask: BlockCausal, batch: int) -> list[int]:
    """The window of each batch item in frames; -1: unbounded."""
    return [_UNBOUNDED if w is None else w for w in mask.windows(batch)]


def rule_of(mask: BlockCausal) -> list[int]:
    """The mask but for its windows, as an op's schema has it."""
    first_block = mask.frames_per_block if mask.first_block_frames is None else mask.first_block_frames
    return [mask.frame_tokens, mask.frames_per_block, mask.sink_frames, mask.first_frame, first_block]


def mask_of(rule: Sequence[int], windows: Sequence[int]) -> BlockCausal:
    """The inverse of :func:`rule_of` and :func:`window_list`."""
    tokens, block, sink, first, first_block = rule
    limits = tuple(None if w == _UNBOUNDED else w for w in windows)
    return BlockCausal(tokens, block, limits, sink, first, first_block)
