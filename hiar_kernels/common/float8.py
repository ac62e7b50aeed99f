"""Numbers in 8 bits, as the 8-bit ops and their references state it: e4m3 or int8 with one float32 scale for each row,
e4m3 also for each frame and head; and how a ring stores values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
ROW_DTYPES = {E4M3: LARGEST, torch.int8: 127.0}
"""What rows are quantised to -> its largest number."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros
GROUP = 16  # keys that a ring of values stores in an order of its own
NO_GRADIENT = "has no gradient; 8 bits are for inference: use torch.no_grad()"
_AT_ONCE = 1 << 21  # numbers that a CPU widens: their indices take four bytes each


def check_row_dtype(op: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless rows can be quantised to the dtype."""
    if dtype not in ROW_DTYPES:
        legal = " or ".join(str(one).removeprefix("torch.") for one in ROW_DTYPES)
        raise ValueError(f"{op}: dtype must be {legal}, got {str(dtype).removeprefix('torch.')}")


def quantize_last(y: Tensor, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """y [..., C] -> e4m3 or int8 [..., C] and the scale of each row, float32 [...]: y is nearly values * scale.

    In float32: scale = max|row| / 448 (int8: 127), values = y / scale, to the nearest, ties to even. A row with a
    number that is not finite is NaN: with scale 1 in e4m3, by its scale in int8, which has no NaN.
    """
    y, largest = y.float().contiguous(), ROW_DTYPES[dtype]
    amax = y.abs().amax(-1)
    scale = torch.where(amax.isfinite(), (amax / largest).clamp_min(SMALLEST_SCALE), torch.nan)
    values = y / scale[..., None]  # at most 448 but for rounding of the scale, which may lift it to 448 (1 + 2^-23)
    values = values.clamp_(-largest, largest)
    if dtype == torch.int8:
        return values.round_().nan_to_num_(nan=0.0).to(dtype), scale
    return values.to(dtype), scale.nan_to_num(nan=1.0)


def quantize_frames(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., P, H, D], P tokens of a frame -> e4m3 of that shape and float32 [..., H]: each frame of a head is a row
    of :func:`quantize_last`.
    """
    values, scale = quantize_last(x.transpose(-3, -2).flatten(-2))
    return values.unflatten(-1, (x.shape[-3], x.shape[-1])).transpose(-3, -2), scale


def bits(x: Tensor) -> Tensor:
    """x as a dtype that torch can index and pad: e4m3 as bytes."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x


def widened(values: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 in a wider dtype: exact. On a CPU from a table of all 256, several times as fast as torch's cast."""
    if values.dtype != E4M3 or values.device.type not in ("cpu", "meta"):  # meta: where memory is predicted
        return values.to(dtype)
    table = torch.arange(256, dtype=torch.uint8, device=values.device).view(E4M3).to(dtype)
    index, result = bits(values).flatten(), torch.empty(values.numel(), dtype=dtype, device=values.device)
    for first in range(0, len(index), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        torch.index_select(table, 0, index[part].int(), out=result[part])
    return result.view(values.shape)


def nearest_(y: Tensor) -> Tensor:
    """Round y, of magnitude at most 448 or NaN, to the nearest number of e4m3, ties to even, in place."""
    if y.dtype != torch.float32:
        return y.copy_(y.to(E4M3))
    # 2^e <= |y| < 2^(e + 1) has steps of 2^(e - 3), and below 2^-6 as there: those of float32 at 1.5 2^(e + 20)
    large = (y.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min_(2.0**-6).mul_(1.5 * 2**20)
    return y.add_(large).sub_(large)


def padded(tokens: int) -> int:
    """Places for the keys of a frame in a ring of values: a multiple of 16."""
    return -(-tokens // GROUP) * GROUP


def pack_values(v: Tensor) -> Tensor:
    """Values [..., P, H, D] of a frame as an 8-bit ring stores them: [..., H, D, padded(P)], the keys of a channel side
    by side.

    Of 16 keys in turn, place 4 t + {0, 1} holds key 2 t + {0, 1} and place 4 t + {2, 3} holds key 8 + 2 t + {0, 1},
    t = 0..3: an 8-bit product on Hopper's tensor cores takes the probabilities of its keys as the product before left
    them. Places past the last key hold 0. Any dtype.
    """
    places = padded(v.shape[-3])
    keys = F.pad(bits(v), (0, 0, 0, 0, 0, places - v.shape[-3])).unflatten(-3, (-1, 2, 4, 2))
    return keys.transpose(-5, -4).flatten(-6, -3).movedim(-3, -1).contiguous().view(v.dtype)


def unpack_values(packed: Tensor, tokens: int) -> Tensor:
    """The inverse of :func:`pack_values`: [..., H, D, padded(P)] -> [..., P, H, D] for P = ``tokens``."""
    keys = bits(packed).movedim(-1, -3).unflatten(-3, (-1, 4, 2, 2)).transpose(-5, -4).flatten(-6, -3)
    return keys[..., :tokens, :, :].contiguous().view(packed.dtype)
