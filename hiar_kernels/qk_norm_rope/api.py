"""Public qk_norm_rope and qk_norm_rope_append."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import check_eps, check_floats, check_tensor, choose, require
from .._pointwise import automatic, prepare
from . import ops, reference  # noqa: F401  (registers the ops)

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
    _validate("qk_norm_rope", qkv, q_weight, k_weight, frames, num_heads, grid, cells, eps, theta)
    if choose("qk_norm_rope", impl, IMPLS, auto=automatic(q_weight, k_weight, qkv, norm=True)) == "triton":
        prepare("qk_norm_rope", norm=True, q_weight=q_weight, k_weight=k_weight, qkv=qkv)
        q, k = torch.ops.hiar.qk_norm_rope(qkv, q_weight, k_weight, frames, num_heads, *grid, eps, theta, cells)
    else:
        q, k = reference.qk_norm_rope(qkv, q_weight, k_weight, frames, num_heads, *grid, eps, theta, cells)
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
    check_floats("qk_norm_rope_append", qkv=qkv, k_cache=k_cache, v_cache=v_cache)
    check_tensor("qk_norm_rope_append", "slots", slots)
    _validate("qk_norm_rope_append", qkv, q_weight, k_weight, frames, num_heads, grid, cells, eps, theta)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, q_weight, k_weight))
    require(not wants_grad, "qk_norm_rope_append: has no gradient; use qk_norm_rope, or torch.no_grad()")
    op, batch = "qk_norm_rope_append", qkv.shape[0]
    if rows is not None:
        if rows.dim() != 2 or rows.shape[0] not in (1, 2) or rows.shape[1] != batch:
            raise ValueError(f"{op}: rows must be [1 or 2, {batch}], got {list(rows.shape)}")
        if rows.is_floating_point():
            raise ValueError(f"{op}: rows must be integers, got {rows.dtype}")
    fits = slots.dim() == 2 if rows is None else slots.dim() == 3 and slots.shape[0] == rows.shape[0]
    if not fits or slots.shape[-2] not in (1, batch) or slots.shape[-1] != frames.shape[1]:
        times = "" if rows is None else f"{rows.shape[0]}, "
        raise ValueError(f"{op}: slots must be [{times}{batch} or 1, {frames.shape[1]}], got {list(slots.shape)}")
    if slots.is_floating_point():
        raise ValueError(f"{op}: slots must be integers, got {slots.dtype}")
    shape, tokens = (num_heads, qkv.shape[2] // 3 // num_heads), _tokens(grid, cells)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        fits = cache.dim() == 4 and cache.shape[2:] == shape and not cache.shape[1] % tokens
        if not fits or (rows is None and cache.shape[0] != batch):
            want = f"[{batch if rows is None else 'any'}, n * {tokens}, {shape[0]}, {shape[1]}]"
            raise ValueError(f"{op}: {name} must be {want}, got {list(cache.shape)}")
    floats = {"q_weight": q_weight, "k_weight": k_weight, "qkv": qkv, "k_cache": k_cache, "v_cache": v_cache}
    dense = k_cache.stride(3) == v_cache.stride(3) == 1
    auto = automatic(*floats.values(), norm=True, cuda=True) if dense else "reference"
    impl = choose("qk_norm_rope_append", impl, APPEND_IMPLS, auto=auto)
    function = reference.qk_norm_rope_append
    if impl != "reference":
        prepare("qk_norm_rope_append", impl=impl, norm=True, **floats)
        hiar = torch.ops.hiar
        function = hiar.qk_norm_rope_append_cuda if impl == "cuda" else hiar.qk_norm_rope_append
    return function(qkv, q_weight, k_weight, frames, slots, k_cache, v_cache, num_heads, *grid, eps, theta, cells, rows)


def _tokens(grid: tuple[int, int], cells: tuple[int, int] | None) -> int:
    """Tokens of a frame that are there."""
    return grid[0] * grid[1] if cells is None else cells[1] - cells[0]


def _validate(
    op: str,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    frames: Tensor,
    num_heads: int,
    grid: tuple[int, int],
    cells: tuple[int, int] | None,
    eps: float,
    theta: float,
) -> None:
    check_floats(op, qkv=qkv, q_weight=q_weight, k_weight=k_weight)
    check_tensor(op, "frames", frames)
    check_eps(op, eps)
    if theta is None or isinstance(theta, str) or not 0 < theta < math.inf:
        raise ValueError(f"{op}: theta must be a finite number above 0, got {theta!r}")
    if not isinstance(grid, Sequence) or len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"{op}: grid must be (rows, columns) of at least 1, got {grid!r}")
    if cells is not None and not (len(cells) == 2 and 0 <= cells[0] < cells[1] <= grid[0] * grid[1]):
        raise ValueError(
            f"{op}: cells must be (start, stop) with 0 <= start < stop <= {grid[0] * grid[1]}, got {cells}"
        )
    tokens = _tokens(grid, cells)
    if qkv.dim() != 3:
        raise ValueError(f"{op}: qkv must be [B, T, 3 H D], got {list(qkv.shape)}")
    b, t, c = qkv.shape
    if num_heads < 1 or c % (6 * num_heads):
        raise ValueError(f"{op}: width {c} of qkv is not 3 x {num_heads} heads of an even size")
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        if w.shape != (c // 3,):
            raise ValueError(f"{op}: {name} must be [{c // 3}], got {list(w.shape)}")
    if frames.dim() != 2 or frames.shape[0] not in (1, b) or frames.shape[1] * tokens != t:
        raise ValueError(f"{op}: frames must be [{b} or 1, {t} / {tokens}], got {list(frames.shape)}")
    if qkv.shape[2] > 1 and qkv.stride(2) != 1:
        raise ValueError(f"{op}: the last dimension of qkv must be dense, got stride {qkv.stride(2)}; use contiguous()")
    if frames.device != qkv.device:
        raise ValueError(f"{op}: frames must be on {qkv.device} like qkv, got {frames.device}")
    if frames.is_floating_point():
        raise ValueError(f"{op}: frames must be integer ids, got {frames.dtype}")
