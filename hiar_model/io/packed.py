"""Quantised tensors of a weight file, memory-mapped until they are dequantised, a few rows at a time.

Every number is computed in float32, q times scale (minus a minimum, in some GGUF types), and rounded once to the dtype
that is asked for. The types of GGUF are those of ggml (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); the
`gguf` package dequantises them with numpy on one core, this module with torch on any device, to the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 21
"""Numbers that are dequantised at a time."""
_K = 256  # numbers in a block of GGUF's K types


def temporary_bytes(numbers: int = CHUNK) -> int:
    """Bytes that dequantising takes at most beside the tensors before and after it. numbers: of the largest tensor."""
    return 24 * min(numbers, CHUNK)


@dataclass(frozen=True, eq=False)
class Packed(ABC):
    """A quantised tensor.

    Attributes:
        name: its key in the file. kind: of its numbers, in words. shape: after dequantising.
    """

    name: str
    kind: str
    shape: torch.Size

    def dim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """The count of numbers."""
        return math.prod(self.shape)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes in the file, with scales."""

    @abstractmethod
    def dequantise(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        """The tensor, in this dtype and on this device; ValueError of one line for scales that cannot be right."""


@dataclass(frozen=True, eq=False)
class Scaled(Packed):
    """float8 or int8 times scales.

    Attributes:
        values: [rows, ...]. scale: [n, m], one number for each block of ``block`` (rows, columns); blocks at the lower
            and the right edge may be smaller.
    """

    values: Tensor
    scale: Tensor
    block: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, with scales."""
        return self.values.nbytes + self.scale.nbytes

    def by_rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The stored numbers, of that dtype, [out, in], and a scale for each row, float32 [out]; None: other numbers,
        or scales of smaller blocks.
        """
        rows = self.shape[0] if len(self.shape) == 2 else 0
        if self.values.dtype != dtype or tuple(self.scale.shape) not in ((1, 1), (rows, 1)):
            return None
        return self.values, self.scale.float().flatten().expand(rows).contiguous()

    def dequantise(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        """See :meth:`Packed.dequantise`."""
        rows, columns = self.block if not self.shape else (self.shape[0], self.shape[1:].numel())
        result = torch.empty(rows, columns, dtype=dtype, device=device)
        scale = self.scale.to(device, torch.float32)
        some_zero = bool((scale == 0).any())
        flat = self.values.reshape(rows, columns)
        step = max(1, CHUNK // max(columns, 1))
        for start in range(0, rows, step):
            part = flat[start : start + step].to(device).to(torch.float32)
            of = scale[torch.arange(start, start + len(part), device=device) // self.block[0]]
            if of.shape[1] > 1:
                of = of.repeat_interleave(self.block[1], 1)[:, :columns]
            if some_zero and bool((part.ne(0) & of.eq(0)).any()):
                raise ValueError(f"{self.name}: a scale is 0 where the numbers are not")
            result[start : start + step] = part.mul_(of)
        return result.view(self.shape)


@dataclass(frozen=True, eq=False)
class Blocks(Packed):
    """Blocks of a GGUF type, ``kind`` of :data:`BLOCKS`: data uint8, as in the file."""

    data: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes

    def dequantise(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        """See :meth:`Packed.dequantise`."""
        numbers, nbytes, unpack = BLOCKS[self.kind]
        result = torch.empty(self.numel(), dtype=dtype, device=device).view(-1, numbers)
        blocks, step = self.data.reshape(-1, nbytes), CHUNK // numbers
        for start in range(0, len(blocks), step):
            part = unpack(blocks[start : start + step].to(device))
            result[start : start + step] = part.view(-1, numbers)
        return result.view(self.shape)


# A block [n, bytes] uint8 -> its numbers [n, ...] float32.


def _half(data: Tensor) -> Tensor:
    """[n, 2] bytes -> float16 as float32 [n, 1]."""
    return data.contiguous().view(torch.float16).float()


def _q8_0(data: Tensor) -> Tensor:
    return data[:, 2:].contiguous().view(torch.int8).float().mul_(_half(data[:, :2]))


def _six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minima of 6 bits, uint8 [n, 8] each; the last four of each lie in spare bits."""
    low, high, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([low & 63, (rest & 15) | ((low >> 2) & 48)], 1)
    minima = torch.cat([high & 63, (rest >> 4) | ((high >> 2) & 48)], 1)
    return scales, minima


def _nibbles(data: Tensor) -> Tensor:
    """[n, 128] -> uint8 [n, 8, 32]: of each 32 bytes first the low halves, then the high ones."""
    data = data.view(-1, 4, 1, 32)
    return torch.cat([data & 15, data >> 4], 2).view(-1, 8, 32)


def _with_minima(data: Tensor, q: Tensor) -> Tensor:
    """q [n, 8, 32] times the scales, minus the minima, that a Q4_K or Q5_K block begins with."""
    scales, minima = _six_bits(data[:, 4:16])
    d, least = _half(data[:, :2]) * scales, _half(data[:, 2:4]) * minima
    return q.float().mul_(d[..., None]).sub_(least[..., None])


def _q4_k(data: Tensor) -> Tensor:
    return _with_minima(data, _nibbles(data[:, 16:].contiguous()))


def _q5_k(data: Tensor) -> Tensor:
    bits = torch.arange(8, dtype=torch.uint8, device=data.device).view(1, 8, 1)
    high = (data[:, None, 16:48] >> bits) & 1
    return _with_minima(data, _nibbles(data[:, 48:].contiguous()).add_(high, alpha=16))


def _q6_k(data: Tensor) -> Tensor:
    low = data[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], 2).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=data.device).view(1, 1, 4, 1)
    high = (data[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    q = (low + (high << 4)).view(torch.int8).sub_(32).view(-1, 16, 16)
    scales = _half(data[:, 208:]) * data[:, 192:208].contiguous().view(torch.int8)
    return q.float().mul_(scales[..., None])


BLOCKS: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "Q8_0": (32, 34, _q8_0),
    "Q6_K": (_K, 210, _q6_k),
    "Q5_K": (_K, 176, _q5_k),
    "Q4_K": (_K, 144, _q4_k),
}
"""GGUF type -> numbers of a block, its bytes, and what unpacks it."""
