"""The norms as layers, for `kernelize` of Hugging Face's `kernels`: only ``forward``, no state of their own.

A model's layer keeps its weights and gets this ``forward``, which reads them; so they fit torch's ``nn.RMSNorm`` and
``nn.LayerNorm`` and layers with the same attributes. Each equals the function of its name, any number of leading
dimensions; differentiable. docs/kernels/index.md shows how to use them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .norm import ada_layer_norm, gated_residual, layer_norm, rms_norm

__all__ = ["AdaLayerNorm", "GatedResidual", "LayerNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """``forward`` of :class:`torch.nn.RMSNorm`: x [..., C], weight [C] or None, eps (None: of the dtype)."""

    can_torch_compile: bool = True
    weight: Tensor | None
    eps: float | None

    def forward(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) times the weight."""
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(_tokens(x), weight, eps=eps).view(x.shape)


class LayerNorm(nn.Module):
    """``forward`` of :class:`torch.nn.LayerNorm` over the last dimension: x [..., C], weight and bias [C] or None."""

    can_torch_compile: bool = True
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Layer norm, times the weight, plus the bias."""
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
        bias = x.new_zeros(x.shape[-1]) if self.bias is None else self.bias
        return layer_norm(_tokens(x), weight, bias, eps=self.eps).view(x.shape)


class AdaLayerNorm(nn.Module):
    """Layer norm without affine, then a shift and scale of each frame: x [B, T, C], shift and scale [B or 1, F, C]."""

    can_torch_compile: bool = True
    eps: float

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """LN(x) (1 + scale) + shift."""
        return ada_layer_norm(x, shift, scale, eps=self.eps)


class GatedResidual(nn.Module):
    """x + gate y: x and y [B, T, C], one gate vector for each frame [B or 1, F, C]."""

    can_torch_compile: bool = True

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """x + gate y."""
        return gated_residual(x, y, gate)


def _tokens(x: Tensor) -> Tensor:
    """[..., C] as [1, T, C]."""
    return x.reshape(1, -1, x.shape[-1])


for _layer in (AdaLayerNorm, GatedResidual, LayerNorm, RMSNorm):
    del _layer.__annotations__  # on Python 3.14 a member of the class, and `kernels` refuses what nn.Module has not
