# mypy: allow-incomplete-defs
"""merge_attention in Triton: forward (it has no backward)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compile import Case
from .._dispatch import require
from .._triton import register

_BLOCK_T = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["T", "tiles"])
def _merge_attention_fwd_kernel(
    parts_ptr, lses_ptr, out_ptr, lse_ptr, stride_pn, stride_pb, stride_pt, stride_ph, stride_ln, stride_lb, stride_lh,
    stride_lt, T, H, tiles,
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    t = (pid % tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    dims = tl.arange(0, BLOCK_D)
    live = t < T
    whole = live[:, None] & (dims < HEAD_DIM)[None, :]
    lses_ptr += b * stride_lb + h * stride_lh + t * stride_lt
    parts_ptr += b * stride_pb + h * stride_ph + t[:, None] * stride_pt + dims[None, :]

    highest = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    for n in range(PARTS):
        part = tl.load(lses_ptr + tl.cast(n, tl.int64) * stride_ln, mask=live, other=float("-inf"))
        highest = tl.maximum(highest, part.to(tl.float32))
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for n in range(PARTS):
        part = tl.load(lses_ptr + tl.cast(n, tl.int64) * stride_ln, mask=live, other=float("-inf"))
        weight = tl.exp(part.to(tl.float32) - highest)
        total += weight
        # a part that saw no key weighs 0, whatever it holds
        used = whole & (weight > 0)[:, None]
        x = tl.load(parts_ptr + tl.cast(n, tl.int64) * stride_pn, mask=used, other=0.0)
        acc += weight[:, None] * x.to(tl.float32)
    some = total > 0
    out = acc / tl.where(some, total, 1.0)[:, None]
    out_offs = ((b * T + t[:, None]) * H + h) * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=whole)
    lse = tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + (b * H + h) * T + t, lse, mask=live)


def merge(parts: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """parts [N, B, T, H, D], lses [N, B, H, T] -> out [B, T, H, D] of the dtype, lse [B, H, T] float32."""
    n, b, t, h, d = parts.shape
    out = torch.empty((b, t, h, d), dtype=dtype, device=parts.device)
    lse = torch.empty((b, h, t), dtype=torch.float32, device=parts.device)
    tiles = triton.cdiv(t, _BLOCK_T)
    if out.numel():
        if parts.stride(-1) != 1:
            parts = parts.contiguous()
        with torch.cuda.device_of(parts):
            _merge_attention_fwd_kernel[(b * h * tiles,)](
                parts, lses, out, lse, *parts.stride()[:4], *lses.stride(), t, h, tiles, PARTS=n, HEAD_DIM=d,
                BLOCK_T=_BLOCK_T, BLOCK_D=max(16, triton.next_power_of_2(d)), num_warps=4,
            )  # fmt: skip
    return out, lse


def _stacked(tensors: list[Tensor]) -> Tensor:
    """The tensors along a new first dimension: a view where they lie evenly spaced in one storage, else a copy."""
    first = tensors[0]
    step = tensors[1].storage_offset() - first.storage_offset() if len(tensors) > 1 else 0
    even = step >= 0 and all(
        x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and x.storage_offset() == first.storage_offset() + i * step
        and x.stride() == first.stride()
        for i, x in enumerate(tensors)
    )
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride())) if even else torch.stack(tensors)


def launch(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """hiar::merge_attention."""
    known = outs[0].dtype in _DTYPES
    require(known, f"merge_attention: impl='triton' takes bfloat16, float16 or float32, got {outs[0].dtype}")
    for x in (*outs, *lses):
        same = x.device == outs[0].device
        require(same, f"merge_attention: every part must be on {outs[0].device}, got {x.device}")
    return merge(_stacked(outs), _stacked(lses), outs[0].dtype)


register("merge_attention", launch)


def compile_cases(arch: int) -> list[Case]:
    """Two halves of the keys of a block of Wan 1.3B; one configuration serves every architecture."""
    pointers = {"parts_ptr": "*fp32", "lses_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32"}
    constexprs = {"PARTS": 2, "HEAD_DIM": 128, "BLOCK_T": _BLOCK_T, "BLOCK_D": 128}
    others = [a for a in _merge_attention_fwd_kernel.arg_names if a not in pointers and a not in constexprs]
    return [
        Case(
            "two halves, Wan 1.3B",
            _merge_attention_fwd_kernel,
            {**pointers, **dict.fromkeys(others, "i32")},
            constexprs,
            divisible=(*pointers, "stride_pn", "stride_pb", "stride_pt", "stride_ph"),
            num_warps=4,
        )
    ]
