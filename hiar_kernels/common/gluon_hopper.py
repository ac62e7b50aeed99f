# mypy: allow-incomplete-defs
"""What the attention kernels for Hopper share, in Gluon: descriptors of tensors, copies, reductions of a row, the
exponential, the rescale.
"""

from __future__ import annotations

import functools

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .shapes import HEAD_DIM, steps

# Registers of a thread: at launch, then of the consumers and of the producer (3 warpgroups share 65536).
LAUNCH_REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)

_PACK = 32  # numbers of a thread, of two rows
_RESCALE = gl.constexpr(
    "{ .reg .pred p; "
    + " ".join(f"mov.b32 ${i}, ${_PACK + i};" for i in range(_PACK))
    + f" setp.eq.f32 p, ${2 * _PACK}, 0f3F800000; "
    + " ".join(f"setp.eq.and.f32 p, ${2 * _PACK + i}, 0f3F800000, p;" for i in (1, 2, 3, _PACK // 2, _PACK - 1))
    + " @p bra DONE; "
    + " ".join(f"mul.f32 ${i}, ${i}, ${2 * _PACK + i};" for i in range(_PACK))
    + " DONE: }"
)
_RESCALE_OPERANDS = gl.constexpr(",".join(["=r"] * _PACK + ["r"] * (2 * _PACK)))
_RESCALE_PACK = gl.constexpr(_PACK)
# Triton 3.9 has it under a new name only, 3.7 and older under the old one only.
copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@functools.cache
def layout(bits: int) -> gl.NVMMASharedLayout:
    """Of a tile of numbers of so many bits in shared memory, as a product reads it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=3)


def descriptor(x: Tensor, shape: list[int], strides: list[int], rows: int) -> TensorDescriptor:
    """The numbers of x as a tensor of that shape and those strides, in boxes of [1, rows, 128]."""
    return TensorDescriptor(x, shape, strides, [1, rows, HEAD_DIM], layout(8 * x.element_size()))


def by_token(x: Tensor, rows: int) -> TensorDescriptor:
    """x [B, T, H, 128] as [B, T, H * 128], in boxes of ``rows`` tokens of one head."""
    b, t, h, d = x.shape
    return descriptor(x, [b, t, h * d], [*steps(x)[:2], 1], rows)


def slot_stride(x: Tensor, tokens: int) -> int:
    """Frame slots of x [B, slots * tokens, H, 128] from one item to the next."""
    return steps(x)[0] // (tokens * steps(x)[1])


def by_slot(x: Tensor, tokens: int, rows: int) -> TensorDescriptor:
    """x [B, slots * tokens, H, 128] as [frame slots of all items, tokens, H * 128], in boxes of ``rows`` tokens of one
    head, of which none leaves its slot.
    """
    b, t, h, d = x.shape
    shape = [(b - 1) * slot_stride(x, tokens) + t // tokens, tokens, h * d]
    return descriptor(x, shape, [tokens * steps(x)[1], steps(x)[1], 1], rows)


def descriptor_type(dtype: str, rows: int) -> str:
    """Of a descriptor of such boxes of "bf16" or "fp8e4nv", where a kernel is compiled ahead of time."""
    return f"tensordesc<{dtype}[1, {rows}, {HEAD_DIM}],{layout(16 if dtype == 'bf16' else 8)!r}>"


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def row_max(x, LAYOUT: gl.constexpr):
    """Reduce in 8 chains per row: a single chain of 32 dependent steps would be too slow."""
    chunks = gl.max(x.reshape([x.shape[0], x.shape[1] // 32, 32]), axis=1)
    return gl.convert_layout(gl.max(chunks, axis=1), LAYOUT)


@gluon.jit
def row_sum(x, LAYOUT: gl.constexpr):
    chunks = gl.sum(x.reshape([x.shape[0], x.shape[1] // 32, 32]), axis=1)
    return gl.convert_layout(gl.sum(chunks, axis=1), LAYOUT)


@gluon.jit
def rescaled(acc, alpha):
    """acc times alpha, row by row. Where no maximum of a thread's two rows moved, alpha is 1 and nothing is multiplied:
    that is so in most blocks, and what the chip does not do leaves power to the tensor cores.
    """
    _, alpha = gl.broadcast(acc, alpha[:, None])
    return gl.inline_asm_elementwise(
        _RESCALE, _RESCALE_OPERANDS, [acc, alpha], dtype=gl.float32, is_pure=True, pack=_RESCALE_PACK
    )


# 2^x of one of four numbers without the special function unit: x = i + f with |f| <= 1/2, a polynomial for 2^f, and i
# added to its exponent. Relative error 8e-5, of numbers that are then rounded to 4 bits.
_HALF_POLYNOMIAL = gl.constexpr(
    "{ .reg .f32 x, i, f; .reg .b32 e, y; "
    "ex2.approx.ftz.f32 $0, $4; ex2.approx.ftz.f32 $1, $5; ex2.approx.ftz.f32 $2, $6; "
    "max.f32 x, $7, 0fC2FC0000; "  # -126
    "add.rn.f32 i, x, 0f4B400000; "  # 1.5 * 2^23: the integer is in the low bits
    "shl.b32 e, i, 23; "
    "sub.rn.f32 i, i, 0f4B400000; "
    "sub.rn.f32 f, x, i; "
    "fma.rn.f32 x, f, 0f3D61FBAE, 0f3E786F0D; "
    "fma.rn.f32 x, x, f, 0f3F31798D; "
    "fma.rn.f32 x, x, f, 0f3F7FFB49; "
    "mov.b32 y, x; "
    "add.s32 $3, y, e; }"
)


@gluon.jit
def exp2_partly_by_polynomial(x):
    return gl.inline_asm_elementwise(
        _HALF_POLYNOMIAL, "=r,=r,=r,=r,r,r,r,r", [x], dtype=gl.float32, is_pure=True, pack=4
    )
