"""Public int8_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import triton_loader
from ..common.dispatch import check_tensor, choose, require_no_gradient
from ..common.float8 import NO_GRADIENT
from ..common.pointwise import DTYPES, TRITON_INSTALLED
from ..common.torch_library import OPS
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "triton")
MOST_CHANNELS = 2**16  # 128^2 times as many still fit into int32


def int8_linear(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor, *, impl: str = "auto"
) -> Tensor:
    """A linear layer in int8 (W8A8): ``x_scales weight_scales (x @ weight.T) + bias``.

    Args:
        x: int8 [..., K], K <= 65536. x_scales: float32 [...], as :func:`quantize_rows` gives both.
        weight: int8 [N, K], contiguous. weight_scales: float32 [N].
        bias: [N], bfloat16, float16 or float32; the result has its dtype.
        impl: "auto" | "reference" | "triton".

    Returns:
        [..., N]. The product is summed in int32, exactly, then scaled in float32 and rounded once. A row whose scale is
        NaN is NaN. No gradient.

    Raises:
        ValueError: shapes or dtypes do not fit, a gradient is asked for, or impl="triton" cannot take the device.

    Example:
        >>> x, w = quantize_rows(torch.tensor([[2.0, 1.0]]), dtype=torch.int8), torch.eye(2)
        >>> int8_linear(*x, *quantize_rows(w, dtype=torch.int8), torch.zeros(2))
        tensor([[2.0000, 1.0079]])
    """
    _check(x, x_scales, weight, weight_scales, bias)
    require_no_gradient("int8_linear", NO_GRADIENT, x_scales, weight_scales, bias)
    auto = "triton" if x.is_cuda and TRITON_INSTALLED else "reference"
    if choose("int8_linear", impl, IMPLS, auto=auto) == "triton":
        triton_loader.load("int8_linear", x)
        y: Tensor = OPS.int8_linear(x, x_scales, weight, weight_scales, bias)
        return y
    return reference.int8_linear(x, x_scales, weight, weight_scales, bias)


def _check(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> None:
    op = "int8_linear"
    named = {"x": x, "x_scales": x_scales, "weight": weight, "weight_scales": weight_scales, "bias": bias}
    for name, t in named.items():
        check_tensor(op, name, t)
    for name, t in (("x", x), ("weight", weight)):
        if t.dtype != torch.int8:
            raise ValueError(f"{op}: {name} must be int8, got {t.dtype}")
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MOST_CHANNELS:
        raise ValueError(f"{op}: x must be [..., 1 <= K <= {MOST_CHANNELS}], got {list(x.shape)}")
    channels, outputs = x.shape[-1], weight.shape[0] if weight.dim() else 0
    shapes = {
        "x_scales": (x_scales, x.shape[:-1]),
        "weight": (weight, (outputs, channels)),
        "weight_scales": (weight_scales, (outputs,)),
        "bias": (bias, (outputs,)),
    }
    for name, (t, shape) in shapes.items():
        if t.shape != torch.Size(shape):
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, got {t.device}")
    for name, t in (("x_scales", x_scales), ("weight_scales", weight_scales)):
        if t.dtype != torch.float32:
            raise ValueError(f"{op}: {name} must be float32, got {t.dtype}")
    if bias.dtype not in DTYPES:
        raise ValueError(f"{op}: bias must be bfloat16, float16 or float32, got {bias.dtype}")
