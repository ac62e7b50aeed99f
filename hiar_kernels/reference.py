"""The oracle: every op's eager reference under its public name, on the CPU and in any dtype up to float64."""

from __future__ import annotations

from functools import partial

from .append_fp8 import append_fp8 as _append_fp8
from .append_fp8 import qk_norm_rope_append_fp8 as _qk_norm_rope_append_fp8
from .attention import api as _attention
from .attention_fp8 import attention_fp8 as _attention_fp8
from .flow_step import flow_step as _flow_step
from .int8_linear import int8_linear as _int8_linear
from .merge_attention import merge_attention as _merge_attention
from .norm import api as _norm
from .qk_norm_rope import qk_norm_rope as _qk_norm_rope
from .qk_norm_rope import qk_norm_rope_append as _qk_norm_rope_append
from .quantize_rows import quantize_rows as _quantize_rows
from .ring_advance import ring_advance as _ring_advance
from .rms_silu_pad import rms_silu_pad as _rms_silu_pad

attention = partial(_attention.attention, impl="reference")
attention_with_lse = partial(_attention.attention_with_lse, impl="reference")
attention_fp8 = partial(_attention_fp8, impl="reference")
merge_attention = partial(_merge_attention, impl="reference")
qk_norm_rope = partial(_qk_norm_rope, impl="reference")
qk_norm_rope_append = partial(_qk_norm_rope_append, impl="reference")
append_fp8 = partial(_append_fp8, impl="reference")
qk_norm_rope_append_fp8 = partial(_qk_norm_rope_append_fp8, impl="reference")
layer_norm = partial(_norm.layer_norm, impl="reference")
rms_norm = partial(_norm.rms_norm, impl="reference")
ada_layer_norm = partial(_norm.ada_layer_norm, impl="reference")
gated_residual = partial(_norm.gated_residual, impl="reference")
gated_residual_layer_norm = partial(_norm.gated_residual_layer_norm, impl="reference")
gated_residual_ada_layer_norm = partial(_norm.gated_residual_ada_layer_norm, impl="reference")
ada_layer_norm_quantized = partial(_norm.ada_layer_norm_quantized, impl="reference")
gated_residual_ada_layer_norm_quantized = partial(_norm.gated_residual_ada_layer_norm_quantized, impl="reference")
quantize_rows = partial(_quantize_rows, impl="reference")
int8_linear = partial(_int8_linear, impl="reference")
flow_step = partial(_flow_step, impl="reference")
ring_advance = partial(_ring_advance, impl="reference")
rms_silu_pad = partial(_rms_silu_pad, impl="reference")
