"""Modules of diffusers' AutoencoderKLWan in which norm, SiLU and causal padding are one op.

They take over the children of diffusers' modules, so state-dict keys stay the same, and follow diffusers' protocol:
``feat_cache`` holds the last input frames of each convolution, ``feat_idx[0]`` is the index of the next convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiar_kernels import rms_silu_pad

Cache = list[Any]  # of Tensor, diffusers' "Rep", or None


def fuse(vae: Any) -> Any:
    """Fuse norm, SiLU and causal padding of a VAE into one op, in place; returns it."""
    for path, module in list(vae.named_modules()):
        if type(module).__name__ == "WanResidualBlock":
            vae.set_submodule(path, _ResidualBlock(module))
    vae.encoder, vae.decoder = _Encoder(vae.encoder), _Decoder(vae.decoder)
    return vae


def to_channels_last(vae: Any) -> Any:
    """Make the 3D convolutions of a VAE channels-last, in place; returns it."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


class _Adopting(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        activation = module.get_submodule("nonlinearity")
        if not isinstance(activation, nn.SiLU):
            raise ValueError(f"the fused VAE needs SiLU, this VAE has {type(activation).__name__}: pass fused=False")
        for name, child in module.named_children():
            self.add_module(name, child)


class _ResidualBlock(_Adopting):
    """diffusers' WanResidualBlock, for inference: without dropout."""

    norm1: nn.Module
    norm2: nn.Module
    conv1: nn.Conv3d
    conv2: nn.Conv3d
    conv_shortcut: nn.Module

    def forward(self, x: Tensor, feat_cache: Cache | None = None, feat_idx: list[int] | None = None) -> Tensor:
        h = _norm_conv(self.norm1, self.conv1, x, feat_cache, feat_idx)
        return _norm_conv(self.norm2, self.conv2, h, feat_cache, feat_idx) + self.conv_shortcut(x)


class _Decoder(_Adopting):
    """diffusers' WanDecoder3d."""

    conv_in: nn.Module
    mid_block: nn.Module
    up_blocks: nn.ModuleList
    norm_out: nn.Module
    conv_out: nn.Conv3d

    def forward(
        self,
        x: Tensor,
        feat_cache: Cache | None = None,
        feat_idx: list[int] | None = None,
        first_chunk: bool = False,
    ) -> Tensor:
        x = _conv(self.conv_in, x, feat_cache, feat_idx)
        x = self.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
        for block in self.up_blocks:
            x = block(x, feat_cache=feat_cache, feat_idx=feat_idx, first_chunk=first_chunk)
        return _norm_conv(self.norm_out, self.conv_out, x, feat_cache, feat_idx)


class _Encoder(_Adopting):
    """diffusers' WanEncoder3d."""

    conv_in: nn.Module
    down_blocks: nn.ModuleList
    mid_block: nn.Module
    norm_out: nn.Module
    conv_out: nn.Conv3d

    def forward(self, x: Tensor, feat_cache: Cache | None = None, feat_idx: list[int] | None = None) -> Tensor:
        x = _conv(self.conv_in, x, feat_cache, feat_idx)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x, feat_cache=feat_cache, feat_idx=feat_idx)
        return _norm_conv(self.norm_out, self.conv_out, x, feat_cache, feat_idx)


def _conv(conv: nn.Module, x: Tensor, cache: Cache | None, index: list[int] | None) -> Tensor:
    """The causal input convolution of the encoder or decoder."""
    if cache is None or index is None:
        return conv(x)
    before, i = cache[index[0]], index[0]
    last = x[:, :, -2:] if before is None else torch.cat([before[:, :, -1:], x[:, :, -2:]], 2)[:, :, -2:]
    cache[i], index[0] = last.clone(), i + 1
    return conv(x, before)


def _norm_conv(norm: nn.Module, conv: nn.Conv3d, x: Tensor, cache: Cache | None, index: list[int] | None) -> Tensor:
    """conv(silu(norm(x))). The op pads in time; the convolution pads rows and columns."""
    weight = norm.get_parameter("gamma").flatten()
    if cache is None or index is None:
        padded, _ = rms_silu_pad(x, weight)
    else:
        padded, cache[index[0]] = rms_silu_pad(x, weight, cache[index[0]])
        index[0] += 1
    return F.conv3d(padded, conv.weight, conv.bias, padding=(0, 1, 1))
