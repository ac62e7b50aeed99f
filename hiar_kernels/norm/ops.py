"""``hiar::layer_norm`` and the other ops of the family: schemas, fakes, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.torch_library import define
from . import reference
from .inputs import ARGUMENTS, OPTIONAL_GATE, QUANTIZED, NormInputs, names_of


def _define(op: str) -> None:
    names = names_of(op)
    normed = op != "gated_residual"
    residual, quantized = normed and "y" in names, op in QUANTIZED
    outputs = 1 + residual + quantized

    def eager(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        return reference.norm(op, NormInputs.from_schema(op, *arguments))

    def fake(x: Tensor, *others: Any) -> Tensor | tuple[Tensor, ...]:
        results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(outputs - quantized)]
        if quantized:
            scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
            results = [*results[:-1], torch.empty(x.shape, dtype=others[-1], device=x.device), scales]
        return tuple(results) if outputs > 1 else results[0]

    optional = {"gate": "?"} if QUANTIZED.get(op, op) == OPTIONAL_GATE else {}
    schema = (
        [f"Tensor{optional.get(name, '')} {name}" for name in names]
        + (["float eps"] if normed else [])
        + (["ScalarType dtype"] if quantized else [])
    )
    define(__package__, op, ", ".join(schema), outputs, eager, fake, () if quantized else range(len(names)))


for _op in (*ARGUMENTS, *QUANTIZED):
    _define(_op)
