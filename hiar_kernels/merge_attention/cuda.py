"""merge_attention in CUDA C++ (csrc/merge_attention.cu): all partial results in one pass, each read where it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import cuda_loader

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_OUTS = 32


def launch(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """hiar::merge_attention_cuda."""
    op, first = "merge_attention", outs[0]
    if first.dtype not in _DTYPES:
        raise ValueError(f"{op}: impl='cuda' takes bfloat16, float16 or float32, got {first.dtype}")
    if len(outs) > _MAX_OUTS:
        raise ValueError(f"{op}: impl='cuda' takes at most {_MAX_OUTS} outs, got {len(outs)}")
    b, t, h, _ = first.shape
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    lse = torch.empty((b, h, t), dtype=torch.float32, device=first.device)
    dense = [x if x.stride(3) == 1 else x.contiguous() for x in outs]
    torch.ops.hiar_cuda.merge_attention(dense, [x.float() for x in lses], out, lse)
    return out, lse


cuda_loader.register("merge_attention_cuda", launch)
