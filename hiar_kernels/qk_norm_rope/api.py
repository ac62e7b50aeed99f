"""Public qk_norm_rope and qk_norm_rope_append."""

from __future__ import annotations

from torch import Tensor

from ..common.dispatch import choose, require_no_gradient
from ..common.pointwise import automatic, prepare
from ..common.torch_library import OPS
from . import ops, reference  # noqa: F401  (registers the ops)
from .inputs import Rings, RopeInputs, append_as_schema, token_grid

IMPLS = ("reference", "triton")
APPEND_IMPLS = ("reference", "triton", "cuda")


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    frames: Tensor,
    *,
    num_heads: int,
    grid: tuple[int, int],
    eps: float = 1e-6,
    theta: float = 10000.0,
    cells: tuple[int, int] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """From the fused qkv projection: RMSNorm of q and k over the full width, then 3D RoPE (Wan2.1).

    Args:
        qkv: [B, T, 3 H D], contiguous; tokens in (frame, row, column) order.
        q_weight, k_weight: [H D], any floating dtype.
        frames: int32 or int64 [B or 1, F], absolute frame ids on the device; angles are float64: frame 1,000,000 works.
        num_heads: H; D must be even.
        grid: (rows, columns) of tokens in a frame; T = F rows columns.
        eps: of the RMSNorm. theta: base of the rotary frequencies.
        cells: (start, stop) if qkv holds only these tokens of every frame: T = F (stop - start).
        impl: "auto" | "reference" | "triton".

    Returns:
        q, k, v [B, T, H, D] in the dtype of qkv; v is a view of qkv. Differentiable in qkv and the weights.

    Raises:
        ValueError: shapes or dtypes do not fit, or impl="triton" cannot take the device or a dtype.
    """
    op = "qk_norm_rope"
    inputs = RopeInputs(qkv, q_weight, k_weight, frames, num_heads, *token_grid(op, grid), eps, theta, cells)
    inputs.validate(op)
    if choose(op, impl, IMPLS, auto=automatic(q_weight, k_weight, qkv, norm=True)) == "triton":
        prepare(op, norm=True, q_weight=q_weight, k_weight=k_weight, qkv=qkv)
        q, k = OPS.qk_norm_rope(*inputs.as_schema())
    else:
        q, k = reference.qk_norm_rope(inputs)
    return q, k, qkv[..., 2 * q_weight.numel() :].unflatten(-1, (num_heads, -1))


def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    frames: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    num_heads: int,
    grid: tuple[int, int],
    eps: float = 1e-6,
    theta: float = 10000.0,
    cells: tuple[int, int] | None = None,
    rows: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """:func:`qk_norm_rope` that writes k and v straight into the frame slots of a ring. No autograd.

    Args:
        slots: int32 or int64 [B or 1, F] on the device: the slot of each frame, in 0..S-1, distinct within a row.
        k_cache, v_cache: [B, S P, H, D], P = rows columns or those of ``cells``; may be strided. Written in place.
        rows: None: what is row b of qkv goes into row b of the ring. Int32 or int64 [N, B] on the device, N 1 or 2: it
            goes into row ``rows[n, b]`` at ``slots[n, b]`` for each n, so that two rings can share keys; ``slots`` are
            [N, B or 1, F] then, and the rings may have any number of rows. ``rows[1, b]`` = -1: only into the first.
        impl: "auto" | "reference" | "triton" | "cuda". The others: as in :func:`qk_norm_rope`.

    Returns:
        q [B, T, H, D].

    Raises:
        ValueError: shapes or dtypes do not fit, a gradient is asked for, impl="triton" or "cuda" cannot take the
            device, a dtype or the layout of a cache, or is not installed.
    """
    op = "qk_norm_rope_append"
    inputs = RopeInputs(qkv, q_weight, k_weight, frames, num_heads, *token_grid(op, grid), eps, theta, cells)
    inputs.validate(op)
    reason = "has no gradient; use qk_norm_rope, or torch.no_grad()"
    require_no_gradient(op, reason, qkv, q_weight, k_weight, k_cache, v_cache)
    rings = Rings(slots, k_cache, v_cache, rows)
    rings.validate(op, inputs)
    floats = {"q_weight": q_weight, "k_weight": k_weight, "qkv": qkv, "k_cache": k_cache, "v_cache": v_cache}
    dense = k_cache.stride(3) == v_cache.stride(3) == 1
    auto = automatic(*floats.values(), norm=True, cuda=True) if dense else "reference"
    impl = choose(op, impl, APPEND_IMPLS, auto=auto)
    if impl == "reference":
        return reference.qk_norm_rope_append(inputs, rings)
    prepare(op, impl=impl, norm=True, **floats)
    kernel = OPS.qk_norm_rope_append_cuda if impl == "cuda" else OPS.qk_norm_rope_append
    return kernel(*append_as_schema(inputs, rings))
