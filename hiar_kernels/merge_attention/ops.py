"""``hiar::merge_attention``: schema and fake; inference only, so no autograd formula."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.torch_library import define, wide_dtype
from . import reference


def _fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    first = outs[0]
    return torch.empty(first.shape, dtype=first.dtype, device=first.device), torch.empty(
        lses[0].shape, dtype=wide_dtype(first), device=first.device
    )


# tensor lists have no gradient formula here: the eager reference, which torch differentiates, serves training
for _name in ("merge_attention", "merge_attention_cuda"):  # an op has one kernel for a device: Triton's, CUDA's
    define(__package__, _name, "Tensor[] outs, Tensor[] lses", 2, reference.merge_attention, _fake, (), mutates=True)
