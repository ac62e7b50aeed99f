# mypy: allow-incomplete-defs
"""Helpers of the norm kernels: [B, F tokens, C] cut into tiles of tokens that never leave their frame.

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

from ..common.aot import Case
from ..common.torch_library import frames_of
from .inputs import NormInputs

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
    """x itself if its last dimension is dense in memory, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def frame_vectors(inputs: NormInputs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gate, shift and scale as [B or 1, F, C], dense along C; affine vectors [C] stand in for shift and scale."""

    def per_frame(m: Tensor | None) -> Tensor | None:
        return m if m is None else unit_stride(m if m.dim() == 3 else m.expand(1, inputs.frames, -1))

    shift, scale = (inputs.shift, inputs.scale) if inputs.weight is None else (inputs.bias, inputs.weight)
    return per_frame(inputs.gate), per_frame(shift), per_frame(scale)


def token_strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Strides of [B, T, C] under the names that the kernels use; 0 of None."""
    b, t = (0, 0) if x is None else x.stride()[:2]
    return {f"stride_{name}b": b, f"stride_{name}t": t}


def frame_strides(name: str, m: Tensor | None) -> dict[str, int]:
    """Strides of [B or 1, F, C], the rows of a single one repeated; 0 of None."""
    b, f = (0, 0) if m is None else (0 if m.shape[0] == 1 else m.stride(0), m.stride(1))
    return {f"stride_{name}b": b, f"stride_{name}f": f}


def groups_of(x: Tensor, frames: int, op: str) -> tuple[int, int]:
    """Tokens in a group, fewer where few programs would leave the chip empty; and groups in each frame of x [B, T, C].

    Both follow from the shape alone, so a gradient has the same bits on every GPU.
    """
    group = FULL_GROUP if x.shape[0] * x.shape[1] >= MANY else 16
    return group, triton.cdiv(frames_of(x, frames, op), group)


def partial_sums(x: Tensor, frames: int, groups: int) -> Tensor:
    """Buffer for the sums of each group: float32 [B, F, G, C]."""
    return torch.empty((x.shape[0], frames, groups, x.shape[2]), dtype=torch.float32, device=x.device)


def production_case(
    name: str,
    kernel: Any,
    channels: int,
    narrow: str,
    wide: str,
    tile: dict[str, int],
    fp_fusion: bool = True,
    eight_bits: dict[str, str] | None = None,
    **constexprs: Any,
) -> Case:
    """A launch with the kernel's pointers (without ``_ptr``) in bfloat16, in float32, and of types of their own; those
    not named are None.

    Pointers and strides are multiples of 16, ``eps`` is a float, all else int32.
    """
    types = {f"{a}_ptr": kind for names, kind in ((narrow, "*bf16"), (wide, "*fp32")) for a in names.split()}
    types |= {f"{a}_ptr": kind for a, kind in (eight_bits or {}).items()}
    absent = dict.fromkeys(a for a in kernel.arg_names if a.endswith("_ptr") and a not in types)
    values = {"C": channels, **{k: v for k, v in tile.items() if k != "num_warps"}, **absent, **constexprs}
    options: dict[str, Any] = {"num_warps": tile["num_warps"], "fp_fusion": fp_fusion}
    return Case.of(f"{name}{channels} channels", kernel, {**types, "eps": "fp32"}, values, **options)


@triton.jit
def tile_of_program(F, tiles):
    """(batch item, frame, tile within the frame) of this program; 64 bits where strides come in."""
    pid = tl.program_id(0)
    frame = pid // tiles
    return (frame // F).to(tl.int64), (frame % F).to(tl.int64), pid % tiles


@triton.jit
def normalise(x, mask, eps, C: tl.constexpr, RMS: tl.constexpr):
    """Normed rows and the factor that normed them, 1 / (standard deviation or root mean square).

    x [BLOCK_T, BLOCK_C] is 0 outside of the mask.
    """
    if RMS:
        factor = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
        xhat = x * factor[:, None]
    else:
        mean = tl.sum(x, 1) / C
        centred = tl.where(mask, x - mean[:, None], 0.0)
        factor = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
        xhat = centred * factor[:, None]
    return xhat, factor


@triton.jit
def norm_gradient(g, xhat, factor, C: tl.constexpr, RMS: tl.constexpr):
    """Gradient of x, where g is the gradient of its normed rows xhat."""
    if RMS:
        dx = (g - xhat * (tl.sum(g * xhat, 1) / C)[:, None]) * factor[:, None]
    else:
        along = tl.sum(g * xhat, 1) / C
        dx = (g - (tl.sum(g, 1) / C)[:, None] - xhat * along[:, None]) * factor[:, None]
    return dx
