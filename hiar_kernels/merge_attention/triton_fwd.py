# mypy: allow-incomplete-defs
"""merge_attention in Triton: forward (it has no backward)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import Case
from ..common.shapes import HEAD_DIM
from ..common.triton_loader import FUSED, register

_BLOCK_T = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _max_lse(m_i, lses_ptr, stride_n, mask, COUNT: tl.constexpr):
    """The greatest logsumexp of each token, among these partial results too."""
    for n in range(COUNT):
        lse = tl.load(lses_ptr + tl.cast(n, tl.int64) * stride_n, mask=mask, other=float("-inf"))
        m_i = tl.maximum(m_i, lse.to(tl.float32))
    return m_i


@triton.jit
def _add_weighted(acc, l_i, m_i, outs_ptr, lses_ptr, stride_pn, stride_ln, mask, whole, COUNT: tl.constexpr):
    """Add the weighted outputs of these partial results, and their weights."""
    for n in range(COUNT):
        lse = tl.load(lses_ptr + tl.cast(n, tl.int64) * stride_ln, mask=mask, other=float("-inf"))
        weight = tl.exp(lse.to(tl.float32) - m_i)
        l_i += weight
        # without a visible key the weight is 0, whatever the output holds
        used = whole & (weight > 0)[:, None]
        x = tl.load(outs_ptr + tl.cast(n, tl.int64) * stride_pn, mask=used, other=0.0)
        acc += weight[:, None] * x.to(tl.float32)
    return acc, l_i


@triton.jit(do_not_specialize=["T", "tiles"])
def _merge_attention_fwd_kernel(
    outs_ptr, lses_ptr, more_outs_ptr, more_lses_ptr, out_ptr, lse_ptr, stride_pn, stride_pb, stride_pt, stride_ph,
    stride_ln, stride_lb, stride_lh, stride_lt, stride_mn, stride_mb, stride_mt, stride_mh, stride_kn, stride_kb,
    stride_kh, stride_kt, T, H, tiles,
    COUNT: tl.constexpr, MORE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Two stacks of partial results: COUNT evenly spaced ones, and MORE others."""
    pid = tl.program_id(0)
    b = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    t = (pid % tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    dims = tl.arange(0, BLOCK_D)
    mask = t < T
    whole = mask[:, None] & (dims < HEAD_DIM)[None, :]
    lses_ptr += b * stride_lb + h * stride_lh + t * stride_lt
    outs_ptr += b * stride_pb + h * stride_ph + t[:, None] * stride_pt + dims[None, :]
    if MORE > 0:
        more_lses_ptr += b * stride_kb + h * stride_kh + t * stride_kt
        more_outs_ptr += b * stride_mb + h * stride_mh + t[:, None] * stride_mt + dims[None, :]

    m_i = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    m_i = _max_lse(m_i, lses_ptr, stride_ln, mask, COUNT)
    if MORE > 0:
        m_i = _max_lse(m_i, more_lses_ptr, stride_kn, mask, MORE)
    m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
    l_i = tl.zeros([BLOCK_T], dtype=tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    acc, l_i = _add_weighted(acc, l_i, m_i, outs_ptr, lses_ptr, stride_pn, stride_ln, mask, whole, COUNT)
    if MORE > 0:
        acc, l_i = _add_weighted(acc, l_i, m_i, more_outs_ptr, more_lses_ptr, stride_mn, stride_kn, mask, whole, MORE)
    any_weight = l_i > 0
    out = acc / tl.where(any_weight, l_i, 1.0)[:, None]
    out_offs = ((b * T + t[:, None]) * H + h) * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=whole)
    lse = tl.where(any_weight, m_i + tl.log(tl.where(any_weight, l_i, 1.0)), float("-inf"))
    tl.store(lse_ptr + (b * H + h) * T + t, lse, mask=mask)


_Stack = tuple[Tensor, Tensor]
"""Partial outputs [n, B, T, H, D] and their logsumexps [n, B, H, T]."""


def merge(outs: Tensor, lses: Tensor, dtype: torch.dtype, more: _Stack | None = None) -> tuple[Tensor, Tensor]:
    """outs [N, B, T, H, D], lses [N, B, H, T] -> out [B, T, H, D] of the dtype, lse [B, H, T] float32.

    ``more``: other partial results of the same queries, wherever they lie.
    """
    n, b, t, h, d = outs.shape
    out = torch.empty((b, t, h, d), dtype=dtype, device=outs.device)
    lse = torch.empty((b, h, t), dtype=torch.float32, device=outs.device)
    tiles = triton.cdiv(t, _BLOCK_T)
    if out.numel():
        outs = outs if outs.stride(-1) == 1 else outs.contiguous()
        others, other_lses = (None, None) if more is None else more
        if others is not None and others.stride(-1) != 1:
            others = others.contiguous()
        more_strides = [0] * 8
        if others is not None and other_lses is not None:
            more_strides = [*others.stride()[:4], *other_lses.stride()]
        with torch.cuda.device_of(outs):
            _merge_attention_fwd_kernel[(b * h * tiles,)](
                outs, lses, others, other_lses, out, lse, *outs.stride()[:4], *lses.stride(), *more_strides, t, h,
                tiles, COUNT=n, MORE=0 if others is None else len(others), HEAD_DIM=d, BLOCK_T=_BLOCK_T,
                BLOCK_D=max(16, triton.next_power_of_2(d)), num_warps=4, **FUSED,
            )  # fmt: skip
    return out, lse


def _step(a: Tensor, b: Tensor) -> int | None:
    """Numbers from a to b, if both lie alike in one storage."""
    alike = (a.dtype, a.stride()) == (b.dtype, b.stride())
    alike = alike and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    return int(b.storage_offset() - a.storage_offset()) if alike else None


def _spaced(tensors: list[Tensor]) -> int:
    """How many of the tensors, from the first on, lie at equal distances in one storage."""
    step = _step(*tensors[:2]) if len(tensors) > 1 else None
    if step is None or step < 0:
        return 1
    return next((i for i in range(2, len(tensors)) if _step(*tensors[i - 1 : i + 1]) != step), len(tensors))


def _stacks(outs: list[Tensor], lses: list[Tensor]) -> list[_Stack]:
    """The partial results as one stack or two: views where they lie evenly spaced, else a copy."""
    stacks: list[_Stack] = []
    left, left_lses = outs, lses
    while left:
        n = min(_spaced(left), _spaced(left_lses))
        stacks.append((_view(left[:n]), _view(left_lses[:n])))
        left, left_lses = left[n:], left_lses[n:]
    return stacks if len(stacks) <= 2 else [(torch.stack(outs), torch.stack(lses))]


def _view(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    step = (_step(*tensors[:2]) or 0) if len(tensors) > 1 else 0
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))


def launch(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """hiar::merge_attention."""
    if outs[0].dtype not in _DTYPES:
        raise ValueError(f"merge_attention: impl='triton' takes bfloat16, float16 or float32, got {outs[0].dtype}")
    for x in (*outs, *lses):
        if x.device != outs[0].device:
            raise ValueError(f"merge_attention: every out and lse must be on {outs[0].device}, got {x.device}")
    first, *more = _stacks(outs, lses)
    return merge(*first, outs[0].dtype, *more)


register("merge_attention", launch)


def compile_cases(arch: int) -> list[Case]:
    """Two halves of the keys of a block, as our own forward and as a library leaves them."""

    def case(name: str, more: int, kind: str) -> Case:
        types = {"outs_ptr": kind, "lses_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32"}
        types |= {"more_outs_ptr": kind, "more_lses_ptr": "*fp32"}
        sizes = {"COUNT": 2, "MORE": more, "HEAD_DIM": HEAD_DIM, "BLOCK_T": _BLOCK_T, "BLOCK_D": HEAD_DIM}
        absent = {} if more else {"more_outs_ptr": None, "more_lses_ptr": None}
        aligned = ("stride_p", "stride_m")
        return Case.of(name, _merge_attention_fwd_kernel, types, {**sizes, **absent}, aligned, num_warps=4)

    return [case("two halves", 0, "*fp32"), case("two rows of a launch and a rest", 1, "*bf16")]
