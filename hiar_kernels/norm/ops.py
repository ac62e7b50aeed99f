"""``hiar::layer_norm`` and the other ops of the family: schemas, fakes, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.torch_library import define
from . import reference
from .inputs import ARGUMENTS, OPTIONAL_GATE, NormInputs


def _define(op: str) -> None:
    names = ARGUMENTS[op]
    normed = op != "gated_residual"
    outputs = 2 if normed and "y" in names else 1

    def eager(*arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        return reference.norm(op, NormInputs.from_schema(op, *arguments))

    def fake(x: Tensor, *others: Any) -> Tensor | tuple[Tensor, ...]:
        results = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(outputs))
        return results if outputs > 1 else results[0]

    optional = {"gate": "?"} if op == OPTIONAL_GATE else {}
    schema = [f"Tensor{optional.get(name, '')} {name}" for name in names] + (["float eps"] if normed else [])
    define(__package__, op, ", ".join(schema), outputs, eager, fake, range(len(names)))


for _op in ARGUMENTS:
    _define(_op)
