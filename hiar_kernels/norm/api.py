"""Public functions of the norm family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.dispatch import choose, require_no_gradient
from ..common.float8 import E4M3, NO_GRADIENT
from ..common.pointwise import automatic, prepare
from ..common.torch_library import OPS
from . import ops, reference  # noqa: F401  (registers the ops)
from .inputs import NormInputs, names_of

IMPLS = ("reference", "triton")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """Layer norm over the last dimension with affine weight and bias.

    Args:
        x: [B, T, C]. weight, bias: [C], any floating dtype.
        eps: added to the variance.
        impl: "auto" | "reference" | "triton".

    Returns:
        [B, T, C], dtype of x; computed in float32 (float64 for float64) and rounded once. Differentiable.

    Raises:
        ValueError: shapes do not fit, or impl="triton" cannot take the device or a dtype.

    Example:
        >>> layer_norm(torch.tensor([[[3.0, 1.0]]]), torch.ones(2), torch.zeros(2))
        tensor([[[ 1.0000, -1.0000]]])
    """
    return _run("layer_norm", impl, NormInputs(x, weight=weight, bias=bias, eps=eps))


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) times a weight, over the last dimension (RMSNorm, arXiv 1910.07467).

    Args, returns and errors: as :func:`layer_norm`, without a bias; eps is added to the mean square.

    Example:
        >>> rms_norm(torch.tensor([[[3.0, -3.0]]]), torch.ones(2))
        tensor([[[ 1., -1.]]])
    """
    return _run("rms_norm", impl, NormInputs(x, weight=weight, eps=eps))


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """Layer norm without affine, then a shift and scale of each frame: LN(x) (1 + scale) + shift (adaLN, DiT).

    Args:
        x: [B, T, C]; the F frames' tokens one after another.
        shift, scale: [B or 1, F, C], any floating dtype; F divides T.
        eps, impl: as :func:`layer_norm`; returns and errors too.

    Example:
        >>> x, one = torch.tensor([[[3.0, 1.0]]]), torch.ones(1, 1, 2)
        >>> ada_layer_norm(x, one, one)
        tensor([[[ 3.0000, -1.0000]]])
    """
    return _run("ada_layer_norm", impl, NormInputs(x, shift=shift, scale=scale, eps=eps))


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, impl: str = "auto") -> Tensor:
    """x + gate y, one gate vector for each frame (adaLN, DiT).

    Args:
        x, y: [B, T, C]; the F frames' tokens one after another. y may be of another floating dtype.
        gate: [B or 1, F, C], any floating dtype; F divides T.
        impl: as :func:`layer_norm`; returns and errors too.

    Example:
        >>> gated_residual(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([[[2.0, 3.0]]]))
        tensor([[[2., 3.]]])
    """
    return _run("gated_residual", impl, NormInputs(x, y, gate))


def gated_residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``h = gated_residual(x, y, gate)`` and ``layer_norm(h, weight, bias, eps=eps)`` in one pass over memory.

    Returns:
        h and its norm, both [B, T, C] contiguous, in the dtype of x, each rounded once. Arguments and errors as for the
        two functions.

    Example:
        >>> x, y, one = torch.zeros(1, 1, 2), torch.tensor([[[2.0, 0.0]]]), torch.ones(1, 1, 2)
        >>> gated_residual_layer_norm(x, y, one, one[0, 0], x[0, 0])
        (tensor([[[2., 0.]]]), tensor([[[ 1.0000, -1.0000]]]))
    """
    inputs = NormInputs(x, y, gate, weight=weight, bias=bias, eps=eps)
    return _run("gated_residual_layer_norm", impl, inputs)


def gated_residual_ada_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The end of one transformer sublayer and the start of the next (adaLN, DiT) in one pass over memory:
    ``h = gated_residual(x, y, gate)`` (gate None: h = x + y) and ``ada_layer_norm(h, shift, scale, eps=eps)``.

    Returns:
        h and its norm, both [B, T, C] contiguous, in the dtype of x, each rounded once. Arguments and errors as for the
        two functions.

    Example:
        >>> x, y, zero = torch.zeros(1, 1, 2), torch.tensor([[[2.0, 0.0]]]), torch.zeros(1, 1, 2)
        >>> gated_residual_ada_layer_norm(x, y, None, zero, zero)
        (tensor([[[2., 0.]]]), tensor([[[ 1.0000, -1.0000]]]))
    """
    inputs = NormInputs(x, y, gate, shift, scale, eps=eps)
    return _run("gated_residual_ada_layer_norm", impl, inputs)


def ada_layer_norm_quantized(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, dtype: torch.dtype = E4M3, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`ada_layer_norm` in 8 bits, as a matrix product takes it; quantised without other rounding before.

    Returns:
        values: ``dtype`` (float8_e4m3fn or int8) [B, T, C]; scales: float32 [B, T], as :func:`quantize_rows` gives them
        for the norm in float32. No gradient. Other arguments and errors as for :func:`ada_layer_norm`.

    Example:
        >>> x, zero = torch.tensor([[[3.0, 1.0]]]), torch.zeros(1, 1, 2)
        >>> values, scales = ada_layer_norm_quantized(x, zero, zero)
        >>> values.float() * scales[..., None]
        tensor([[[ 1.0000, -1.0000]]])
    """
    values, scales = _run(
        "ada_layer_norm_quantized", impl, NormInputs(x, shift=shift, scale=scale, eps=eps, dtype=dtype)
    )
    return values, scales


def gated_residual_ada_layer_norm_quantized(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype = E4M3,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gated_residual_ada_layer_norm` with the norm in 8 bits.

    Returns:
        h [B, T, C], dtype of x; values and scales of its norm, as :func:`ada_layer_norm_quantized` gives them. No
        gradient. Other arguments and errors as for :func:`gated_residual_ada_layer_norm`.

    Example:
        >>> x, zero = torch.tensor([[[3.0, 1.0]]]), torch.zeros(1, 1, 2)
        >>> h, values, scales = gated_residual_ada_layer_norm_quantized(x, x, None, zero, zero)
        >>> h, values.float() * scales[..., None]
        (tensor([[[6., 2.]]]), tensor([[[ 1.0000, -1.0000]]]))
    """
    inputs = NormInputs(x, y, gate, shift, scale, eps=eps, dtype=dtype)
    h, values, scales = _run("gated_residual_ada_layer_norm_quantized", impl, inputs)
    return h, values, scales


def _run(op: str, impl: str, inputs: NormInputs) -> Any:
    inputs.validate(op)
    normed = inputs.eps is not None
    tensors = {name: getattr(inputs, name) for name in names_of(op)}
    if inputs.dtype is not None:
        require_no_gradient(op, NO_GRADIENT, *tensors.values())
    if choose(op, impl, IMPLS, auto=automatic(*tensors.values(), norm=normed)) == "triton":
        prepare(op, norm=normed, **tensors)
        return getattr(OPS, op)(*inputs.as_schema(op))
    return reference.norm(op, inputs)
