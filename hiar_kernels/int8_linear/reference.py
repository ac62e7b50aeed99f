"""int8_linear, eager."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def int8_linear(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    """[..., N] in the dtype of the bias."""
    flat, outputs = x.reshape(-1, x.shape[-1]), weight.shape[0]
    if not x.is_cuda and x.shape[-1] > 1:  # of one channel it is wrong, up to torch 2.14 at least
        product = torch._int_mm(flat, weight.t()).float()
    else:  # float64 holds all sums
        product = (flat.double() @ weight.double().t()).float()
    y = torch.addcmul(bias.float(), product * x_scales.reshape(-1, 1), weight_scales)
    return y.to(bias.dtype).view(*x.shape[:-1], outputs)
