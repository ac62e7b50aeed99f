"""A Triton matmul for the tests of the compile gate: small sizes pass, others fail as one asks for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, K, stride_am, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, N: tl.constexpr):
    """c [BLOCK_M, N] = a [BLOCK_M, K] b [K, N], in one block."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, N), tl.arange(0, 64)
    total = tl.zeros([BLOCK_M, N], tl.float32)
    for start in range(0, K, 64):
        a = tl.load(a_ptr + m[:, None] * stride_am + start + k[None, :])
        b = tl.load(b_ptr + (start + k[:, None]) * N + n[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total.to(c_ptr.dtype.element_ty))


@triton.jit
def sum_kernel(x_ptr, out_ptr, N: tl.constexpr, WIDE: tl.constexpr):
    """A sum in float32, or in the dtype of x."""
    x = tl.load(x_ptr + tl.arange(0, N))
    if WIDE:
        x = x.to(tl.float32)
    tl.store(out_ptr, tl.sum(x, 0).to(out_ptr.dtype.element_ty))
