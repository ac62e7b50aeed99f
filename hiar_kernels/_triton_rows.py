# mypy: allow-incomplete-defs
"""What the row-wise Triton kernels share: [B, F tokens, C] cut into tiles of tokens that never leave their frame.

A program of the forward owns one tile of BLOCK_T tokens, so what belongs to a frame (shift, scale, gate) is loaded once
for the tile. A program of the backward walks a group of tokens of one frame, keeps the sums over the group in registers
and writes them once; a second kernel adds the groups up in a fixed order: no atomics, the same bits every time that the
same gradients are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._compile import Case
from ._library import frames_of

WAN = {"Wan 1.3B": 1536, "Wan 14B": 5120}  # channels
# Of the norms' backward. A product that is summed rounded and subtracted from unrounded (a contracted a * b - sum)
# leaves its rounding error times 1 / standard deviation: 1e-5 where all terms cancel, in rows of one channel. It
# costs 7 to 14% more instructions on sm_90, in kernels that wait for memory.
UNFUSED = {"enable_fp_fusion": False}
FULL_GROUP = 64  # tokens that one program of a backward adds up where there are many
MANY = 16384


def norm_tile(channels: int, elements: int, warps_of_one: int = 8) -> dict[str, int]:
    """BLOCK_T x BLOCK_C of a kernel that holds whole rows: about ``elements`` numbers, and the warps to hold them.

    ``warps_of_one``: where rows are so wide that a tile is one token, and what belongs to its frame takes as much room.
    """
    width = max(16, triton.next_power_of_2(channels))
    tokens = min(16, max(1, elements // width))
    return {"BLOCK_T": tokens, "BLOCK_C": width, "num_warps": 4 if width <= 1024 else 8 if tokens > 1 else warps_of_one}


def plain_tile(channels: int, widest: int = 512) -> dict[str, int]:
    """BLOCK_T x BLOCK_C of a kernel without reductions over channels; 512 divides 1536 and 5120."""
    width = min(widest, max(16, triton.next_power_of_2(channels)))
    return {"BLOCK_T": 8, "BLOCK_C": width, "num_warps": 4}


def unit_stride(x: Tensor) -> Tensor:
    """x itself if its last dimension is dense in memory, else a copy of which that is true."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_strides(name: str, x: Tensor) -> dict[str, int]:
    """Strides of [B, T, C] under the names that the kernels use."""
    return {f"stride_{name}b": x.stride(0), f"stride_{name}t": x.stride(1)}


def frame_strides(name: str, m: Tensor) -> dict[str, int]:
    """Strides of [B or 1, F, C], the rows of a single one repeated."""
    return {f"stride_{name}b": 0 if m.shape[0] == 1 else m.stride(0), f"stride_{name}f": m.stride(1)}


def groups_of(x: Tensor, frames: int, op: str) -> tuple[int, int]:
    """Tokens in a group, fewer where few programs would leave the chip empty; and groups in each frame of x [B, T, C].

    Both follow from the shape alone, so a gradient has the same bits on every GPU.
    """
    group = FULL_GROUP if x.shape[0] * x.shape[1] >= MANY else 16
    return group, triton.cdiv(frames_of(x, frames, op), group)


def partial_sums(x: Tensor, frames: int, groups: int) -> Tensor:
    """Room for the sums of each group: [B, F, G, C] float32."""
    return torch.empty((x.shape[0], frames, groups, x.shape[2]), dtype=torch.float32, device=x.device)


def production_case(
    name: str, kernel: Any, narrow: str, wide: str, tile: dict[str, int], fp_fusion: bool = True, **constexprs: Any
) -> Case:
    """A launch at Wan's channels, the kernel's pointers (without ``_ptr``) in bfloat16 and in float32.

    Pointers and strides are multiples of 16, ``eps`` is a float, all else int32.
    """
    pointers = {f"{a}_ptr": kind for names, kind in ((narrow, "*bf16"), (wide, "*fp32")) for a in names.split()}
    values = {"C": WAN[name], **{k: v for k, v in tile.items() if k != "num_warps"}, **constexprs}
    others = [a for a in kernel.arg_names if a not in pointers and a not in values]
    return Case(
        name=name,
        kernel=kernel,
        signature={**pointers, **{a: "fp32" if a == "eps" else "i32" for a in others}},
        constexprs=values,
        divisible=(*pointers, *[a for a in others if a.startswith("stride_")]),
        num_warps=tile["num_warps"],
        fp_fusion=fp_fusion,
    )


@triton.jit
def place(F, tiles):
    """(row of the batch, frame, tile within the frame) of this program; 64 bits where strides come in."""
    pid = tl.program_id(0)
    frame = pid // tiles
    return (frame // F).to(tl.int64), (frame % F).to(tl.int64), pid % tiles


@triton.jit
def normalised(x, live, eps, C: tl.constexpr):
    """Rows of mean 0 and variance 1, and 1 / standard deviation; x [BLOCK_T, BLOCK_C] is 0 where not live."""
    mean = tl.sum(x, 1) / C
    centred = tl.where(live, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def norm_gradient(g, xhat, rstd, C: tl.constexpr):
    """Gradient of x, where g is the gradient of its normalised rows xhat."""
    along = tl.sum(g * xhat, 1) / C
    return (g - (tl.sum(g, 1) / C)[:, None] - xhat * along[:, None]) * rstd[:, None]


@triton.jit
def _sum_partials_kernel(
    partial_ptr, out_ptr, F, groups, summands,
    C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[row] = sum of the ``summands`` groups of a row: those of one video, or of all where they share the row."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, f = (row // F).to(tl.int64), (row % F).to(tl.int64)
    total = tl.zeros((BLOCK_G, BLOCK_C), tl.float32)
    for start in range(0, summands, BLOCK_G):
        n = start + tl.arange(0, BLOCK_G)
        at = ((first + n // groups) * F + f) * groups + n % groups
        live = (n < summands)[:, None] & (cols < C)[None, :]
        total += tl.load(partial_ptr + at[:, None] * C + cols[None, :], mask=live, other=0.0)
    sums = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * C + cols, sums, mask=cols < C)


def sum_partials(partial: Tensor, like: Tensor) -> Tensor:
    """Partial sums [B, F, G, C] -> gradient of ``like`` [B or 1, F, C], contiguous, in its dtype."""
    batch, frames, groups, channels = partial.shape
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    summands = groups if like.shape[0] == batch else batch * groups
    grid = (like.shape[0] * frames, triton.cdiv(channels, _SUM_TILE["BLOCK_C"]))
    _sum_partials_kernel[grid](partial, out, frames, groups, summands, C=channels, **_SUM_TILE)
    return out


_SUM_TILE = {"BLOCK_G": 32, "BLOCK_C": 64, "num_warps": 4}


def sum_partials_case(name: str) -> Case:
    return production_case(name, _sum_partials_kernel, "", "partial out", _SUM_TILE)
