"""The arguments of one attention_fp8 call as one object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.inputs import LARGEST_FRAME, TRITON_HEAD_DIMS, mask_of, rule_of, window_list
from ..attention.mask import BlockCausal
from ..common.dispatch import FLOATS, check_tensor, is_number
from ..common.float8 import E4M3, bits, padded

BLOCK = 128
"""Keys of a block, counted from the start of a frame slot, which no block leaves: one scale of k, one of v."""
P_SCALE = 256.0
"""Of probabilities before they are rounded to e4m3: they are at most 1, 448 is the format's largest, and a power of two
is free inside the exponential. README.md has what other scales do.
"""


@dataclass(frozen=True)
class Float8Inputs:
    """Inputs of one call; the fields are the arguments of :func:`hiar_kernels.attention_fp8`."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_scales: Tensor
    v_scales: Tensor
    q_scales: Tensor | None
    q_frames: Tensor
    kv_frames: Tensor
    mask: BlockCausal
    scale: float | None = None
    out_dtype: torch.dtype | None = None

    @property
    def eight_bits(self) -> bool:
        """Whether the products are of 8 bits: q is."""
        return self.q_scales is not None

    @property
    def softmax_scale(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def result(self) -> torch.dtype:
        """Dtype of the output."""
        default = torch.bfloat16 if self.eight_bits else self.q.dtype
        return default if self.out_dtype is None else self.out_dtype

    def as_schema(self) -> tuple[Any, ...]:
        """The arguments of ``hiar::attention_fp8``: 8 bits as bytes, the mask as integers."""
        return (
            bits(self.q), bits(self.k), bits(self.v), self.k_scales, self.v_scales, self.q_scales, self.q_frames,
            self.kv_frames, rule_of(self.mask), window_list(self.mask, self.q.shape[0]), self.softmax_scale,
            self.result,
        )  # fmt: skip

    @classmethod
    def from_schema(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_scales: Tensor,
        v_scales: Tensor,
        q_scales: Tensor | None,
        q_frames: Tensor,
        kv_frames: Tensor,
        rule: Sequence[int],
        windows: Sequence[int],
        scale: float,
        out_dtype: torch.dtype,
    ) -> Float8Inputs:
        """The inverse of :meth:`as_schema`."""
        q = q if q_scales is None else q.view(E4M3)
        rings = k.view(E4M3), v.view(E4M3), k_scales, v_scales
        return cls(q, *rings, q_scales, q_frames, kv_frames, mask_of(rule, windows), scale, out_dtype)

    def validate(self) -> None:
        """Raise ValueError, in one line, if shapes, dtypes, devices or ids are wrong."""
        op, q, mask = "attention_fp8", self.q, self.mask
        if not isinstance(mask, BlockCausal):
            raise ValueError(f"{op}: mask must be a BlockCausal, got {type(mask).__name__}")
        if self.scale is not None and (not is_number(self.scale) or not -math.inf < self.scale < math.inf):
            raise ValueError(f"{op}: scale must be a finite number, or None for 1 / sqrt(D), got {self.scale!r}")
        named = {"q": q, "k": self.k, "v": self.v, "k_scales": self.k_scales, "v_scales": self.v_scales}
        named |= {"q_frames": self.q_frames, "kv_frames": self.kv_frames}
        named |= {} if self.q_scales is None else {"q_scales": self.q_scales}
        for name, x in named.items():
            check_tensor(op, name, x)
            if x.device != q.device:
                raise ValueError(f"{op}: {name} must be on {q.device} like q, got {x.device}")
        if self.q_scales is None and q.dtype not in FLOATS:
            hint = "; q in 8 bits needs q_scales" if q.dtype == E4M3 else ""
            raise ValueError(f"{op}: q must be bfloat16, float16, float32 or float64, got {q.dtype}{hint}")
        eight = ("q", "k", "v") if self.eight_bits else ("k", "v")
        for name in eight:
            if named[name].dtype != E4M3:
                beside = " beside q_scales" if name == "q" else ""
                raise ValueError(f"{op}: {name} must be {E4M3}{beside}, got {named[name].dtype}")
        if self.result not in FLOATS or not (self.eight_bits or self.result == q.dtype):
            legal = "bfloat16, float16, float32 or float64" if self.eight_bits else f"{q.dtype} like q"
            raise ValueError(f"{op}: out_dtype must be {legal}, got {self.out_dtype}")
        if q.dim() != 4:
            raise ValueError(f"{op}: q must be [B, Tq, H, D], got {list(q.shape)}")
        (b, length, h, d), tokens = q.shape, mask.frame_tokens
        mask.windows(b)
        if length % tokens:
            raise ValueError(f"{op}: q has {length} tokens, no multiple of frame_tokens {tokens}")
        slots = self.kv_frames.shape[-1] if self.kv_frames.dim() else 0
        shapes = {
            "k": (b, slots * tokens, h, d), "v": (b, slots, h, d, padded(tokens)), "k_scales": (b, slots, h),
            "v_scales": (b, slots, h), "q_scales": (b, length, h),
        }  # fmt: skip
        for name, count in (("q_frames", length // tokens), ("kv_frames", slots)):
            ids = named[name]
            if ids.dim() != 2 or ids.shape[0] not in (1, b) or ids.shape[1] != count:
                raise ValueError(f"{op}: {name} must be [{b} or 1, {count}], got {list(ids.shape)}")
            if ids.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{op}: {name} must be int32 or int64, got {ids.dtype}")
        for name, shape in shapes.items():
            if name in named and named[name].shape != shape:
                raise ValueError(
                    f"{op}: {name} must be {list(shape)} for {slots} slots of {tokens} tokens, got "
                    f"{list(named[name].shape)}"
                )
            if name.endswith("scales") and name in named and named[name].dtype != torch.float32:
                raise ValueError(f"{op}: {name} must be torch.float32, got {named[name].dtype}")


def triton_problem(call: Float8Inputs) -> str:
    """Why the Triton kernel cannot take a valid call, after "impl='triton'"; "" if it can."""
    q, d = call.q, call.q.shape[-1]
    if q.dtype not in (E4M3, torch.bfloat16, torch.float16, torch.float32):
        return f"takes q as bfloat16, float16, float32 or 8 bits, got {q.dtype}"
    if call.result not in (torch.bfloat16, torch.float16, torch.float32):
        return f"gives bfloat16, float16 or float32, got out_dtype {call.result}"
    least = 32 if call.eight_bits else 16  # a product on the tensor cores is over 32 numbers of 8 bits
    if d not in TRITON_HEAD_DIMS or d < least:
        legal = ", ".join(str(n) for n in TRITON_HEAD_DIMS if n >= least)
        return f"has head_dim {legal}, got {d}"
    for name, x in (("q", q), ("k", call.k), ("v", call.v)):
        if x.stride(-1) != 1 and x.numel():
            return f"needs {name} with a last stride of 1, got {x.stride(-1)}"
    # from the start of a slot the kernel counts in 32 bits: to the last key of k, to the last channel of v
    reaches = ("k", call.k, call.mask.frame_tokens * call.k.stride(1)), ("v", call.v, d * call.v.stride(3))
    for name, x, reach in reaches:
        if x.numel() and reach >= 2**31:
            return f"needs a slot of {name} within {2**31} numbers, got strides {list(x.stride())}"
    if abs(call.mask.first_frame) >= LARGEST_FRAME:
        return f"takes frame ids below {LARGEST_FRAME}, got mask.first_frame {call.mask.first_frame}"
    return ""
