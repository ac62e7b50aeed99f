# mypy: allow-incomplete-defs
"""cross_attention in Triton: forward (gradients are the reference's)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compile import Case
from .._triton import register

_BLOCK_T = 16
_SHARES = 3
_LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["T", "L", "tiles"])
def _cross_attention_fwd_kernel(
    q_ptr, weight_ptr, k_ptr, v_ptr, counts_ptr, out_ptr, stride_qb, stride_qt, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_nb, T, L, tiles, eps, qk_scale,
    H: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns a share of the heads of BLOCK_T queries: one walk over all for their norm, one to attend.

    Both are unrolled, so that the loads of all heads are under way at once.
    """
    pid = tl.program_id(0)
    first = tl.program_id(1) * SHARE
    b = (pid // tiles).to(tl.int64)
    t = pid % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    live = (t < T)[:, None]
    dims = tl.arange(0, HEAD_DIM)
    q_ptr += b * stride_qb + t.to(tl.int64)[:, None] * stride_qt + dims[None, :]
    squares = tl.zeros([BLOCK_T, HEAD_DIM], tl.float32)
    for h in tl.static_range(H):
        x = tl.load(q_ptr + h * HEAD_DIM, mask=live, other=0.0).to(tl.float32)
        squares += x * x
    rstd = 1 / tl.sqrt_rn(tl.sum(squares, 1) / (H * HEAD_DIM) + eps)

    keys = tl.arange(0, BLOCK_L)
    inside = keys < L
    bias = tl.zeros([BLOCK_L], tl.float32)
    if counts_ptr is not None:
        counts = tl.load(counts_ptr + b * stride_nb + keys, mask=inside, other=0).to(tl.float32)
        inside = inside & (counts > 0)
        bias = tl.log2(tl.where(inside, counts, 1.0))
    k_ptr += b * stride_kb + keys[:, None] * stride_kt + dims[None, :]
    v_ptr += b * stride_vb + keys[:, None] * stride_vt + dims[None, :]
    out_ptr += (b * T + t[:, None]) * (H * HEAD_DIM) + dims[None, :]
    for i in tl.static_range(SHARE):
        h = first + i
        x = tl.load(q_ptr + h * HEAD_DIM, mask=live, other=0.0)
        weight = tl.load(weight_ptr + h * HEAD_DIM + dims).to(tl.float32)
        q = (x.to(tl.float32) * rstd[:, None] * weight[None, :]).to(x.dtype)
        k = tl.load(k_ptr + h * stride_kh, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + h * stride_vh, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale + bias[None, :]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        m = tl.max(scores, 1)
        p = tl.exp2(scores - tl.where(m == float("-inf"), 0.0, m)[:, None])
        l_i = tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / tl.where(l_i == 0, 1.0, l_i)[:, None]
        tl.store(out_ptr + h * HEAD_DIM, out.to(out_ptr.dtype.element_ty), mask=live)


def _share(heads: int) -> int:
    """Heads of a program: a third where they divide so, else all."""
    return heads // _SHARES if heads % _SHARES == 0 else heads


def launch(q: Tensor, q_weight: Tensor, k: Tensor, v: Tensor, kv_counts: Tensor | None, eps: float) -> Tensor:
    """hiar::cross_attention."""
    b, t, _ = q.shape
    length, heads, d = k.shape[1:]
    out = torch.empty((b, t, heads, d), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    counts = None if kv_counts is None else kv_counts if kv_counts.stride(1) == 1 else kv_counts.contiguous()
    tiles = triton.cdiv(t, _BLOCK_T)
    with torch.cuda.device_of(q):
        share = _share(heads)
        _cross_attention_fwd_kernel[(b * tiles, heads // share)](

            q, q_weight.contiguous(), k, v, counts, out, q.stride(0), q.stride(1),
            k.stride(0) if len(k) > 1 else 0, k.stride(1), k.stride(2), v.stride(0) if len(v) > 1 else 0, v.stride(1),
            v.stride(2), 0 if counts is None or len(counts) == 1 else counts.stride(0), t, length, tiles, eps,
            d**-0.5 * _LOG2E, H=heads, SHARE=share, HEAD_DIM=d, BLOCK_T=_BLOCK_T,
            BLOCK_L=max(16, triton.next_power_of_2(length)),
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
    return out


register("cross_attention", launch)


def compile_cases(arch: int) -> list[Case]:
    """A prompt of up to 16 and of up to 128 keys beside Wan 1.3B's queries; one configuration for all."""
    kernel, found = _cross_attention_fwd_kernel, []
    for keys in (16, 128):
        values = {
            "H": 12,
            "SHARE": _share(12),
            "HEAD_DIM": 128,
            "BLOCK_T": _BLOCK_T,
            "BLOCK_L": keys,
            "PRECISION": "tf32",
        }
        signature = {}
        for name in kernel.arg_names:
            if name.endswith("_ptr"):
                signature[name] = "*fp32" if name == "counts_ptr" else "*bf16"
            elif name not in values:
                signature[name] = "fp32" if name in ("eps", "qk_scale") else "i32"
        sixteens = [n for n in signature if n.endswith("_ptr") or (n.startswith("stride_") and n != "stride_nb")]
        found.append(Case(f"{keys} keys", kernel, signature, values, tuple(sixteens), tensor_cores=arch < 90))
    return found
