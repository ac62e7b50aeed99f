"""Kernels for block-autoregressive video: attention over matched-noise caches and the pointwise work around it."""

from . import layers, reference
from .append_fp8 import append_fp8, qk_norm_rope_append_fp8
from .attention import (
    EMPTY,
    AttentionLayout,
    AttentionSchedule,
    BlockCausal,
    KVContext,
    attention,
    attention_layout,
    attention_schedule,
    attention_with_lse,
    takes_layout,
    takes_schedule,
)
from .attention_fp8 import attention_fp8
from .backends import backends
from .common.dispatch import prefer, taken
from .common.float8 import pack_values, unpack_values
from .common.version import __version__ as __version__
from .flow_step import flow_step
from .int8_linear import int8_linear
from .merge_attention import merge_attention
from .norm import (
    ada_layer_norm,
    ada_layer_norm_quantized,
    gated_residual,
    gated_residual_ada_layer_norm,
    gated_residual_ada_layer_norm_quantized,
    gated_residual_layer_norm,
    layer_norm,
    rms_norm,
)
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_append
from .quantize_rows import quantize_rows
from .ring_advance import ring_advance
from .rms_silu_pad import rms_silu_pad

__all__ = [
    "EMPTY",
    "AttentionLayout",
    "AttentionSchedule",
    "BlockCausal",
    "KVContext",
    "ada_layer_norm",
    "ada_layer_norm_quantized",
    "append_fp8",
    "attention",
    "attention_fp8",
    "attention_layout",
    "attention_schedule",
    "attention_with_lse",
    "backends",
    "flow_step",
    "gated_residual",
    "gated_residual_ada_layer_norm",
    "gated_residual_ada_layer_norm_quantized",
    "gated_residual_layer_norm",
    "int8_linear",
    "layer_norm",
    "layers",
    "merge_attention",
    "pack_values",
    "prefer",
    "qk_norm_rope",
    "qk_norm_rope_append",
    "qk_norm_rope_append_fp8",
    "quantize_rows",
    "reference",
    "ring_advance",
    "rms_norm",
    "rms_silu_pad",
    "taken",
    "takes_layout",
    "takes_schedule",
    "unpack_values",
]
