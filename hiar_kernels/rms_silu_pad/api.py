"""Public rms_silu_pad."""

from __future__ import annotations

from torch import Tensor

from ..common.dispatch import check_eps, check_floats, choose
from ..common.pointwise import automatic, prepare
from ..common.torch_library import OPS
from . import ops, reference  # noqa: F401  (registers the op)
from .layout import CACHE_FRAMES

IMPLS = ("reference", "triton")
WIDEST = 2048  # channels: the kernel holds all of a pixel's in registers


def rms_silu_pad(
    x: Tensor, weight: Tensor, cache: Tensor | None = None, *, eps: float = 1e-12, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What stands before a causal 3x3x3 convolution of Wan's VAE: RMS norm over channels, SiLU, the frames before.

    Args:
        x: [B, C, F, H, W], F >= 1. weight: [C], any floating dtype.
        cache: the second result of the call for the frames before x, [B, C, 1 or 2, H, W] in the dtype of x; None at
            the start of a clip: zeros.
        eps: least norm that is divided by (the norm is a sum over channels, as in torch.nn.functional.normalize).
        impl: "auto" | "reference" | "triton".

    Returns:
        [B, C, F + 2, H, W]: two frames of the past, then silu(x / max(|x|, eps) sqrt(C) weight); and its last two
        frames, the ``cache`` of the next call. Dtype of x, computed in float32 (float64 for float64) and rounded once;
        dense in memory, channels last where x is. Rows and columns are left to the convolution, ``padding=(0, 1, 1)``.
        Differentiable (by the reference).

    Raises:
        ValueError: shapes do not fit, or impl="triton" cannot take the device, a dtype or so many channels.
    """
    check_floats("rms_silu_pad", x=x, weight=weight)
    if cache is not None:
        check_floats("rms_silu_pad", x=x, cache=cache)
    check_eps("rms_silu_pad", eps)
    if not (x.dim() == 5 and x.shape[2] > 0):
        raise ValueError(f"rms_silu_pad: x must be [B, C, F >= 1, H, W], got {list(x.shape)}")
    batch, channels, _, *size = x.shape
    if tuple(weight.shape) != (channels,):
        raise ValueError(f"rms_silu_pad: weight must be [{channels}], got {list(weight.shape)}")
    if cache is not None:
        fits = [*cache.shape[:2], *cache.shape[3:]] == [batch, channels, *size] and 1 <= cache.shape[2] <= CACHE_FRAMES
        if not (fits and cache.dtype == x.dtype):
            legal = f"[{batch}, {channels}, 1 or 2, {size[0]}, {size[1]}] {x.dtype}"
            actual = f"{list(cache.shape)} {cache.dtype}"
            raise ValueError(f"rms_silu_pad: cache must be {legal}, got {actual}")
    auto = automatic(x, weight, cache) if channels <= WIDEST else "reference"
    if choose("rms_silu_pad", impl, IMPLS, auto=auto) == "triton":
        prepare("rms_silu_pad", x=x, weight=weight, cache=cache)
        fits = channels <= WIDEST
        if not fits:
            raise ValueError(f"rms_silu_pad: impl='triton' takes at most {WIDEST} channels, got {channels}")
        padded, after = OPS.rms_silu_pad(x, weight, cache, eps)
        return padded, after
    return reference.rms_silu_pad(x, weight, cache, eps)
