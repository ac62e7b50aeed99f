"""Random numbers that depend on a key alone: not on order, rank, batch, process, device, processor or release.

All random numbers come from here: the noise of (seed, video, step, block), and those of training, where sample ``row``
of update ``update`` of a stage comes from ``keyed_generator(seed, stage, update, row)``. So a resumed run needs no
saved generator state, and any number of ranks draws the same batches.

A key is hashed to the 128-bit key of numpy's Philox generator (Salmon et al. 2011), whose raw bits are the same in
every release. They are turned into normals with float64 additions, multiplications, divisions and square roots only,
which IEEE 754 defines to the bit; torch's and numpy's own normals and logarithms differ in the last bits between
instruction sets. Files name this scheme by :data:`hiar_model.version.NOISE`.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checks import as_whole

_CHUNK = 1 << 14  # numbers per array operation, so that results stay in the processor's cache


class _Key(np.random.bit_generator.ISeedSequence):
    """A key as the seed of a bit generator. `Philox(key=...)` would ask the system for entropy first, and drop it."""

    def __init__(self, key: bytes) -> None:
        self._words = np.frombuffer(key, "<u8")

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        return self._words


class KeyedGenerator:
    """Random numbers from a key, as torch tensors on the CPU; successive calls continue the sequence.

    >>> keyed_generator(0, "teacher", 3, 5).normals(2, 2).shape
    torch.Size([2, 2])
    """

    def __init__(self, key: bytes) -> None:
        self._bits = np.random.Philox(_Key(key))  # type: ignore[arg-type]

    def normals(self, *shape: int) -> Tensor:
        """Standard normals, float32, within 2e-6 of the exact quantile up to 6.7 standard deviations."""
        return torch.from_numpy(_normals(self._raw(shape))).view(shape)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform over [0, 1): multiples of 2**-24 in float32, of 2**-53 in float64."""
        digits, kind = {torch.float32: (24, np.float32), torch.float64: (53, np.float64)}[dtype]
        numbers = (self._raw(shape) >> np.uint64(64 - digits)).astype(kind) * kind(2.0**-digits)
        return torch.from_numpy(numbers).view(shape)

    def whole(self, below: int, *shape: int) -> Tensor:
        """Uniform over 0..below - 1, int64; ``below`` at most 2**32."""
        if not 0 < below <= 1 << 32:
            raise ValueError(f"whole: below must be in 1..2**32, got {below}")
        numbers = ((self._raw(shape) >> np.uint64(32)) * np.uint64(below)) >> np.uint64(32)
        return torch.from_numpy(numbers.astype(np.int64)).view(shape)

    def _raw(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        return self._bits.random_raw(math.prod(shape))


Generator = KeyedGenerator | torch.Generator
"""Functions that draw take a keyed generator, or a torch one of the caller."""


def keyed_generator(seed: int, *key: str | int) -> KeyedGenerator:
    """A generator that depends on ``seed`` and ``key`` alone; different keys give independent numbers.

    Raises:
        ValueError: a part of the key is no whole number or text.
    """
    parts = [_part(part) for part in (seed, *key)]
    # JSON keeps 1 apart from "1", and ("ab", "c") from ("a", "bc").
    return KeyedGenerator(hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest())


def _part(part: object) -> str | int:
    value = part if isinstance(part, str) else as_whole(part)
    if value is None:
        raise ValueError(f"keyed_generator: a key is made of whole numbers and texts, got {part!r}")
    return value


def draw_uniform(generator: Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform over [0, 1), on the CPU."""
    if isinstance(generator, KeyedGenerator):
        return generator.uniform(*shape, dtype=dtype)
    return torch.rand(shape, generator=generator, dtype=dtype, device="cpu")


def draw_whole(generator: Generator, below: int, *shape: int) -> Tensor:
    """Uniform over 0..below - 1, int64, on the CPU."""
    if isinstance(generator, KeyedGenerator):
        return generator.whole(below, *shape)
    return torch.randint(below, shape, generator=generator, device="cpu")


# Normals from raw bits, by the inverse of their distribution: Wichura 1988, algorithm AS 241 (PPND7).

_MIDDLE, _SQUARED = (
    0.425,
    0.180625,
)  # as far from 1/2 the first fraction goes, in q * q; beyond it the second one, in sqrt(-log p)
_UPPER = (3.3871327179e0, 5.0434271938e1, 1.5929113202e2, 5.9109374720e1)
_LOWER = (1.0, 1.7895169469e1, 7.8757757664e1, 6.7187563600e1)
_TAIL_UPPER = (1.4234372777e0, 2.7568153900e0, 1.3067284816e0, 1.7023821103e-1)
_TAIL_LOWER = (1.0, 7.3700164250e-1, 1.2021132975e-1)
_LN2 = 0.6931471805599453
_ATANH = tuple(2 / n for n in range(1, 17, 2))  # log((1 + s) / (1 - s)) / s, in s * s

Doubles = NDArray[np.float64]


def _normals(raw: NDArray[np.uint64]) -> NDArray[np.float32]:
    out = np.empty(len(raw), np.float32)
    for first in range(0, len(raw), _CHUNK):
        # (k + 1/2) / 2**52 - 1/2 for k in 0..2**52 - 1: exact, symmetric, never at an end
        q = (raw[first : first + _CHUNK] >> np.uint64(12)).astype(np.float64)
        q += 0.5 - 2.0**51
        q *= 2.0**-52
        r = _SQUARED - q * q
        x = _polynomial(_UPPER, r)
        x *= q
        x /= _polynomial(_LOWER, r)
        (tail,) = (np.abs(q) > _MIDDLE).nonzero()
        ends = q[tail]
        r = np.sqrt(-_log(0.5 - np.abs(ends))) - 1.6
        x[tail] = np.copysign(_polynomial(_TAIL_UPPER, r) / _polynomial(_TAIL_LOWER, r), ends)
        out[first : first + _CHUNK] = x
    return out


def _log(p: Doubles) -> Doubles:
    """Natural logarithm of positive numbers, to 1e-13, with the same bits on every machine."""
    m, exponent = np.frexp(p)
    small = m < 0.7071067811865476
    m = np.where(small, m + m, m)  # within a factor sqrt(2) of 1
    s = (m - 1) / (m + 1)
    return _polynomial(_ATANH, s * s) * s + (exponent - small) * _LN2


def _polynomial(coefficients: tuple[float, ...], x: Doubles) -> Doubles:
    """Coefficients in ascending order of powers."""
    value: Doubles = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value += coefficient
        value *= x
    value += coefficients[0]
    return value
