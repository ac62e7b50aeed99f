"""The ops of the family by their arguments, and the arguments of one call as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.dispatch import check_eps, check_floats
from ..common.float8 import check_row_dtype

ARGUMENTS = {
    "layer_norm": ("x", "weight", "bias"),
    "rms_norm": ("x", "weight"),
    "ada_layer_norm": ("x", "shift", "scale"),
    "gated_residual": ("x", "y", "gate"),
    "gated_residual_layer_norm": ("x", "y", "gate", "weight", "bias"),
    "gated_residual_ada_layer_norm": ("x", "y", "gate", "shift", "scale"),
}
"""Op -> its tensors, in the order of its schema; all are differentiable."""
OPTIONAL_GATE = "gated_residual_ada_layer_norm"
QUANTIZED = {f"{op}_quantized": op for op in ("ada_layer_norm", OPTIONAL_GATE)}
"""Op whose norm comes in 8 bits, with a scale for each row -> the op that it is otherwise; without gradients. Its last
argument is the dtype."""


def names_of(op: str) -> tuple[str, ...]:
    """The tensors of an op, in the order of its schema."""
    return ARGUMENTS[QUANTIZED.get(op, op)]


@dataclass(frozen=True)
class NormInputs:
    """h = x + gate y, and its norm: n (1 + scale) + shift of each frame, n weight + bias, or with RMS n weight.

    x, y: [B, T, C]. gate, shift, scale: [B or 1, F, C]; F divides T. weight, bias: [C]. eps None: no norm. dtype: of a
    norm in 8 bits.
    """

    x: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def from_schema(cls, op: str, *arguments: Any) -> NormInputs:
        """The arguments of ``hiar::<op>``."""
        names = (*names_of(op), "eps", "dtype")
        return cls(**dict(zip(names, arguments)))

    def as_schema(self, op: str) -> tuple[Any, ...]:
        """The inverse of :meth:`from_schema`."""
        tensors = [getattr(self, name) for name in names_of(op)]
        return (*tensors, *(option for option in (self.eps, self.dtype) if option is not None))

    @property
    def frames(self) -> int:
        """F; 1 where nothing belongs to a frame."""
        of_frames = self.scale if self.gate is None else self.gate
        return 1 if of_frames is None else of_frames.shape[1]

    @property
    def rms(self) -> bool:
        return self.weight is not None and self.bias is None

    def validate(self, op: str) -> None:
        """Raise ValueError, in one line, if shapes are wrong."""
        tensors = {name: getattr(self, name) for name in names_of(op)}
        if QUANTIZED.get(op, op) == OPTIONAL_GATE and self.gate is None:
            del tensors["gate"]
        check_floats(op, **tensors)
        if op != "gated_residual":
            check_eps(op, self.eps)
        if self.dtype is not None:
            check_row_dtype(op, self.dtype)
        x, y, gate, shift = self.x, self.y, self.gate, self.shift
        if y is not None:
            if x.dim() != 3 or x.shape != y.shape:
                raise ValueError(f"{op}: x and y must be [B, T, C], got {list(x.shape)}, {list(y.shape)}")
        elif x.dim() != 3:
            raise ValueError(f"{op}: x must be [B, T, C], got {list(x.shape)}")
        batch, _, channels = x.shape
        for name, m in (("gate", gate), ("shift", shift), ("scale", self.scale)):
            if m is None:
                continue
            if m.dim() != 3 or m.shape[0] not in (1, batch) or m.shape[2] != channels:
                raise ValueError(f"{op}: {name} must be [{batch} or 1, F, {channels}], got {list(m.shape)}")
            if gate is not None and m.shape[1] != gate.shape[1]:
                raise ValueError(
                    f"{op}: {name} must be [{batch} or 1, {gate.shape[1]}, {channels}] like gate, got {list(m.shape)}"
                )
            if name == "scale" and shift is not None and m.shape != shift.shape:
                raise ValueError(f"{op}: scale must be {list(shift.shape)} like shift, got {list(m.shape)}")
        for name, p in (("weight", self.weight), ("bias", self.bias)):
            if p is not None and (p.dim() != 1 or p.shape[0] != channels):
                raise ValueError(f"{op}: {name} must be [{channels}], got {list(p.shape)}")
