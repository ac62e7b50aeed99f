"""Public quantize_rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import check_floats, choose, require_no_gradient
from ..common.float8 import E4M3, NO_GRADIENT, check_row_dtype
from ..common.pointwise import automatic, prepare
from ..common.torch_library import OPS
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "triton")
ACTIVATIONS = (None, "gelu_tanh")
WIDEST = 16384  # channels: the kernel holds a row in registers


def quantize_rows(
    x: Tensor, *, activation: str | None = None, dtype: torch.dtype = E4M3, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits for a matrix product, with one scale for each row (token).

    Args:
        x: [..., C], C >= 1, any floating dtype.
        activation: None, or "gelu_tanh": what is quantised is the GELU (tanh form) of x, in the same pass.
        dtype: of the values, float8_e4m3fn or int8.
        impl: "auto" | "reference" | "triton".

    Returns:
        values: ``dtype`` [..., C]; scales: float32 [...], > 0. x is nearly ``values * scales[..., None]``. In float32:
        scale = max|row| / 448 (int8: 127), values = row / scale rounded to the nearest, ties to even; a row does not
        depend on the others. So e4m3 is off by at most 1/16 of a number, or 1/1024 of its scale, int8 by half of its
        scale. A row with a number that is not finite is NaN: its values, or in int8, which has no NaN, its scale. No
        gradient.

    Raises:
        ValueError: no channels, an unknown activation or dtype, a gradient is asked for, or impl="triton" cannot take
            the device, the dtype of x or so many channels.

    Example:
        >>> values, scales = quantize_rows(torch.tensor([[-7.0, 3.5, 0.0]]))
        >>> values.float() * scales[:, None]
        tensor([[-7.0000,  3.5000,  0.0000]])
    """
    check_floats("quantize_rows", x=x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"quantize_rows: x must be [..., C >= 1], got {list(x.shape)}")
    if activation not in ACTIVATIONS:
        legal = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"quantize_rows: activation must be one of {legal}, got {activation!r}")
    check_row_dtype("quantize_rows", dtype)
    require_no_gradient("quantize_rows", NO_GRADIENT, x)
    fits = x.shape[-1] <= WIDEST
    if choose("quantize_rows", impl, IMPLS, auto=automatic(x) if fits else "reference") == "triton":
        prepare("quantize_rows", x=x)
        if not fits:
            raise ValueError(f"quantize_rows: impl='triton' takes at most {WIDEST} channels, got {x.shape[-1]}")
        values, scales = OPS.quantize_rows(x, activation, dtype)
        return values, scales
    return reference.quantize_rows(x, activation, dtype)
