"""Do dequantised weights have the size of weights? A wrong scale makes a white picture and no error otherwise.

The measure of a matrix W is its gain |W| / sqrt(rows), with the Frobenius norm: how long W @ x is, on average over
directions x of the length sqrt(columns), as a root mean square of its numbers. It does not depend on the width. Fresh
layers have 0.3 to 1.4 (Xavier, Kaiming). The shipped models have 0.41 to 3.13 after training; layers of one name lie
within a factor of 1.72 of their median across the blocks, rows within 4.58 of theirs
(`python -m bench.studies.weight_gains`). No published Wan weights were measured.

A float8 matrix whose scale is lost has numbers up to 448 and a gain of hundreds; one of int8 has up to 127, more than
64 from 32 columns on. Where scales are applied twice, divided by or swapped, the factor is about the scale itself,
0.0005 to 0.01. The limits lie between, far from both. Layers of zeros, as training starts with, are legal.
"""

from __future__ import annotations

import re
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..io import packed

LARGEST = 64.0
"""Gain of a matrix."""
SIBLINGS = 30.0
"""Factor between the gain of a matrix and the median of those of its name in all blocks, either way."""
ROWS = 100.0
"""Factor between the longest row of a matrix and its median row."""
SMALLEST = 0.01
"""Median gain of all quantised matrices."""


class WeightCheck:
    """Collects the gains of a checkpoint's matrices; :meth:`finish` compares them.

    Args:
        source: named in errors.

    Attributes:
        gains: key -> gain. rows: key -> length of the longest row divided by that of the median one.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.gains: dict[str, float] = {}
        self.rows: dict[str, float] = {}
        self._quantised: set[str] = set()

    def see(self, key: str, value: Tensor, quantised: bool) -> None:
        """Measure a tensor; those of fewer than two dimensions and ``modulation`` are no matrices.

        Raises:
            ValueError: one line that names ``key``: quantised, and with numbers that are not finite, far too large, or
                with single rows that are.
        """
        if value.dim() < 2 or not key.endswith(".weight") or not value.numel() or value.is_meta:
            return
        matrix = value.flatten(1)
        step = max(1, packed.CHUNK // matrix.shape[1])
        rows = torch.cat([part.float().square().sum(1) for part in matrix.split(step)]).sqrt_()
        gain, longest, middle = (float(x) for x in (rows.square().mean().sqrt(), rows.max(), rows.median()))
        self.gains[key], self.rows[key] = gain, longest / middle if middle > 0 else 1.0
        if not quantised:
            return
        self._quantised.add(key)
        if not gain < float("inf"):  # NaN too
            raise ValueError(f"{self.source}: {key} has numbers that are not finite once it is dequantised")
        if self.rows[key] > ROWS:
            raise ValueError(
                f"{self.source}: {key}, row {int(rows.argmax())} is {self.rows[key]:.3g} times as long as the middle "
                f"one once it is dequantised, expected at most {ROWS:g}: its scale is wrong"
            )
        if gain > LARGEST:
            raise ValueError(
                f"{self.source}: {key} has weights of size {gain:.3g} once it is dequantised, expected about 1 and at "
                f"most {LARGEST:g}: its scale is missing or wrong"
            )

    def finish(self) -> None:
        """Compare the matrices of one name across the blocks, and all with 1.

        Raises:
            ValueError: one line that names the layer that is out of line, or the smallest one.
        """
        roles: dict[str, list[float]] = {}
        for key, gain in self.gains.items():
            if gain > 0:
                roles.setdefault(role(key), []).append(gain)
        gains = sorted(gain for key in self._quantised if (gain := self.gains[key]) > 0)
        if gains and (middle := median(gains)) < SMALLEST:
            key = min(self._quantised, key=lambda one: (self.gains[one] <= 0, self.gains[one]))
            raise ValueError(
                f"{self.source}: quantised weights have size {middle:.3g} once they are dequantised, expected about 1 "
                f"and at least {SMALLEST:g} ({key}: {self.gains[key]:.3g}): their scales are wrong"
            )
        for key in sorted(self._quantised):
            gain, middle = self.gains[key], median(roles.get(role(key), [1.0]))
            if gain > 0 and not middle / SIBLINGS <= gain <= middle * SIBLINGS:
                raise ValueError(
                    f"{self.source}: {key} has weights of size {gain:.3g} once it is dequantised, those of the other "
                    f"blocks {middle:.3g}, expected within a factor of {SIBLINGS:g}: its scale is wrong"
                )


def role(key: str) -> str:
    """The name of a layer without the number of its block."""
    return re.sub(r"^blocks\.\d+\.", "blocks.", key)
