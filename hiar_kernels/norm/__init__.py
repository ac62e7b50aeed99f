"""The norm family: layer norm, RMS norm, adaLN and the gated residual, alone and fused."""

from .api import (
    ada_layer_norm,
    ada_layer_norm_quantized,
    gated_residual,
    gated_residual_ada_layer_norm,
    gated_residual_ada_layer_norm_quantized,
    gated_residual_layer_norm,
    layer_norm,
    rms_norm,
)

__all__ = [
    "ada_layer_norm",
    "ada_layer_norm_quantized",
    "gated_residual",
    "gated_residual_ada_layer_norm",
    "gated_residual_ada_layer_norm_quantized",
    "gated_residual_layer_norm",
    "layer_norm",
    "rms_norm",
]
