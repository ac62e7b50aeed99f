"""merge_attention, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.torch_library import wide_dtype


def merge_attention(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i), in float32 or wider."""
    stacked = torch.stack([lse.to(wide_dtype(outs[0])) for lse in lses])
    hidden = stacked.isneginf().all(0)  # torch.logsumexp has the gradient NaN where all are -inf
    lse = torch.logsumexp(torch.where(hidden, 0, stacked), dim=0).masked_fill(hidden, float("-inf"))
    weights = torch.exp(stacked - torch.where(lse.isfinite(), lse, 0)).transpose(2, 3)[..., None]  # [n, B, T, H, 1]
    # without a visible key the weight is 0, whatever the output holds; before the product, for the weight's gradient
    weighted = [w * torch.where(w > 0, out.to(w.dtype), 0) for w, out in zip(weights, outs, strict=True)]
    return torch.stack(weighted).sum(0).to(outs[0].dtype).contiguous(), lse
