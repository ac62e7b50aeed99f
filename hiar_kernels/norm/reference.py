"""The norm family, eager: float32 or wider inside, each result rounded once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.float8 import quantize_last
from ..common.torch_library import frames_of, wide_dtype
from .inputs import QUANTIZED, NormInputs


def norm(op: str, inputs: NormInputs) -> Tensor | tuple[Tensor, ...]:
    """What an op returns: h, its norm, or both; the norm in 8 bits and its scales."""
    if op in QUANTIZED:
        with torch.no_grad():
            first = () if inputs.y is None else (_residual(op, inputs, inputs.y),)
            assert inputs.dtype is not None
            return (*first, *quantize_last(_normed(op, *first or (inputs.x,), inputs, rounded=False), inputs.dtype))
    if inputs.y is None:
        return _normed(op, inputs.x, inputs)
    h = _residual(op, inputs, inputs.y)
    return h if inputs.eps is None else (h, _normed(op, h, inputs))


def _residual(op: str, inputs: NormInputs, y: Tensor) -> Tensor:
    """x + gate y with one gate for each frame; without a gate x + y."""
    x, y, gate = inputs.x, y.contiguous(), inputs.gate
    wide = wide_dtype(x)
    if gate is None:
        return (x.to(wide) + y.to(wide)).to(x.dtype).contiguous()
    tokens = frames_of(x, gate.shape[1], op)
    x_frames, y_frames = (z.to(wide).unflatten(1, (gate.shape[1], tokens)) for z in (x, y))
    return torch.addcmul(x_frames, y_frames, gate.to(wide).unsqueeze(2)).reshape(x.shape).to(x.dtype).contiguous()


def _normed(op: str, h: Tensor, inputs: NormInputs, rounded: bool = True) -> Tensor:
    """The norm of h, in its dtype; not ``rounded``: as it was computed (adaLN only)."""
    b, t, c = h.shape
    wide, eps = wide_dtype(h), inputs.eps
    assert eps is not None
    if inputs.weight is not None:
        weight = inputs.weight.to(wide)
        if inputs.bias is None:
            return F.rms_norm(h.to(wide), (c,), weight, eps).to(h.dtype).contiguous()
        return F.layer_norm(h.to(wide), (c,), weight, inputs.bias.to(wide), eps).to(h.dtype)
    shift, scale = inputs.shift, inputs.scale
    assert shift is not None and scale is not None
    frames = shift.shape[1]
    n = F.layer_norm(h.to(wide), (c,), eps=eps).view(b, frames, frames_of(h, frames, op), c)
    out = torch.addcmul(shift.to(wide).unsqueeze(2), n, 1 + scale.to(wide).unsqueeze(2)).reshape(b, t, c)
    return out.to(h.dtype) if rounded else out
