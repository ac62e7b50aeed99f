"""Public append_fp8 and qk_norm_rope_append_fp8."""

from __future__ import annotations

from torch import Tensor

from ..common.dispatch import check_floats, check_tensor, choose, require_no_gradient
from ..common.float8 import NO_GRADIENT
from ..common.pointwise import automatic, prepare
from ..common.torch_library import OPS
from ..qk_norm_rope.inputs import RopeInputs, token_grid
from . import ops, reference  # noqa: F401  (registers the ops)
from .inputs import Fp8Rings

IMPLS = ("reference", "triton")
ROPE_IMPLS = ("reference", "triton", "cuda")


def append_fp8(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    *,
    rows: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Keys and values of whole frames into the slots of a ring in 8 bits, with one scale for each frame and head.

    For a frame of a head, over its P tokens and D channels, in float32: scale = max|x| / 448, values = x / scale to
    the nearest e4m3, ties to even. A frame of a head with a number that is not finite is NaN there, with scale 1.
    No autograd.

    Args:
        k, v: [B, T, H, D], any floating dtype, any strides.
        slots: int32 or int64 [B or 1, F] on the device: the slot of each frame, in 0..S-1, distinct within a row;
            P = T / F.
        k_cache: float8_e4m3fn [B, S P, H, D]; written in place, as the next three are.
        v_cache: float8_e4m3fn [B, S, H, D, P16], P16 = P rounded up to a multiple of 16: the keys of a channel side by
            side. Of 16 keys in turn, place 4 t + {0, 1} holds key 2 t + {0, 1} and place 4 t + {2, 3} key
            8 + 2 t + {0, 1}, t = 0..3; places past the last key are 0.
        k_scales, v_scales: float32 [B, S, H], > 0.
        rows: None: row b of k goes into row b of the ring. Int32 or int64 [N, B] on the device, N 1 or 2: it goes into
            row ``rows[n, b]`` at ``slots[n, b]`` for each n, so that two rings can share keys; ``slots`` are
            [N, B or 1, F] then, and the rings may have any number of rows. ``rows[1, b]`` = -1: only into the first.
        impl: "auto" | "reference" | "triton".

    Raises:
        ValueError: shapes or dtypes do not fit, a gradient is asked for, the impl cannot take the device, a dtype or
            the layout of a ring, or is not installed.

    Example:
        >>> k, v = torch.tensor([[[[7.0, -3.5]]]]), torch.tensor([[[[0.0, 2.0]]]])
        >>> e4m3 = {"dtype": torch.float8_e4m3fn}
        >>> k_cache, v_cache = torch.zeros(1, 2, 1, 2, **e4m3), torch.zeros(1, 2, 1, 2, 16, **e4m3)
        >>> k_scales, v_scales = torch.ones(1, 2, 1), torch.ones(1, 2, 1)
        >>> append_fp8(k, v, torch.tensor([[1]]), k_cache, v_cache, k_scales, v_scales)
        >>> k_cache[0, 1, 0].float() * k_scales[0, 1], v_cache[0, 1, 0, :, 0].float() * v_scales[0, 1]
        (tensor([ 7.0000, -3.5000]), tensor([0., 2.]))
    """
    op = "append_fp8"
    check_floats(op, k=k, v=v)
    if k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"{op}: k and v must be [B, T, H, D], both alike, got {list(k.shape)} and {list(v.shape)}")
    rings = Fp8Rings(slots, k_cache, v_cache, k_scales, v_scales, rows)
    check_tensor(op, "slots", slots)
    rings.validate(op, k.device, k.shape, slots.shape[-1] if slots.dim() else 0)
    require_no_gradient(op, NO_GRADIENT, k, v)
    impl = choose(op, impl, IMPLS, auto=_automatic(rings, k, v))
    if impl == "reference":
        reference.append_fp8(k, v, rings)
        return
    prepare(op, k=k, v=v)
    OPS.append_fp8(k, v, *rings.as_schema(), rows)


def qk_norm_rope_append_fp8(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    frames: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    *,
    num_heads: int,
    grid: tuple[int, int],
    eps: float = 1e-6,
    theta: float = 10000.0,
    rows: Tensor | None = None,
    quantize_q: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`qk_norm_rope` whose k and v go straight into the slots of a ring in 8 bits, as :func:`append_fp8` writes
    them: the same numbers as those two one after the other. No autograd.

    Args:
        qkv, q_weight, k_weight, frames, num_heads, grid, eps, theta: as in :func:`qk_norm_rope`.
        slots, k_cache, v_cache, k_scales, v_scales, rows: as in :func:`append_fp8`, P = rows columns of the grid.
        quantize_q: q in 8 bits too, with one scale for each token and head (a row of :func:`quantize_rows`).
        impl: "auto" | "reference" | "triton" | "cuda".

    Returns:
        q [B, T, H, D] in the dtype of qkv; with ``quantize_q`` a pair: q float8_e4m3fn [B, T, H, D] and its scales
        float32 [B, T, H].

    Raises:
        ValueError: as in :func:`append_fp8`.
    """
    op = "qk_norm_rope_append_fp8"
    inputs = RopeInputs(qkv, q_weight, k_weight, frames, num_heads, *token_grid(op, grid), eps, theta)
    inputs.validate(op)
    rings = Fp8Rings(slots, k_cache, v_cache, k_scales, v_scales, rows)
    rings.validate(op, qkv.device, inputs.split_heads, inputs.frames.shape[1])
    require_no_gradient(op, NO_GRADIENT, qkv, q_weight, k_weight)
    impl = choose(op, impl, ROPE_IMPLS, auto=_automatic(rings, q_weight, k_weight, qkv, norm=True, cuda=True))
    if impl == "reference":
        q, q_scales = reference.qk_norm_rope_append_fp8(inputs, rings, quantize_q)
    else:
        prepare(op, impl=impl, norm=True, q_weight=q_weight, k_weight=k_weight, qkv=qkv)
        kernel = OPS.qk_norm_rope_append_fp8_cuda if impl == "cuda" else OPS.qk_norm_rope_append_fp8
        q, q_scales = kernel(*inputs.as_schema()[:4], *rings.as_schema(), *inputs.as_schema()[4:9], quantize_q, rows)
    return (q, q_scales) if quantize_q else q


def _automatic(rings: Fp8Rings, *floats: Tensor, norm: bool = False, cuda: bool = False) -> str:
    """On a CUDA device a kernel, though none was timed: the reference copies what it writes several times."""
    dense = rings.k_cache.stride(-1) == rings.v_cache.stride(-1) == 1
    return automatic(*floats, norm=norm, cuda=cuda) if dense else "reference"
