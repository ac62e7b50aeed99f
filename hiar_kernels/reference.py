"""The oracle: every op's eager reference under its public name, on the CPU and in any dtype up to float64."""

from __future__ import annotations

from functools import partial

from .ada_layer_norm import ada_layer_norm as _ada_layer_norm
from .attention import attention as _attention
from .attention import attention_with_lse as _attention_with_lse
from .flow_step import flow_step as _flow_step
from .gated_residual import gated_residual as _gated_residual
from .gated_residual_ada_layer_norm import gated_residual_ada_layer_norm as _gated_residual_ada_layer_norm
from .gated_residual_layer_norm import gated_residual_layer_norm as _gated_residual_layer_norm
from .layer_norm import layer_norm as _layer_norm
from .merge_attention import merge_attention as _merge_attention
from .qk_norm_rope import qk_norm_rope as _qk_norm_rope
from .qk_norm_rope import qk_norm_rope_append as _qk_norm_rope_append
from .ring_advance import ring_advance as _ring_advance
from .rms_norm import rms_norm as _rms_norm
from .rms_silu_pad import rms_silu_pad as _rms_silu_pad

attention = partial(_attention, impl="reference")
attention_with_lse = partial(_attention_with_lse, impl="reference")
merge_attention = partial(_merge_attention, impl="reference")
qk_norm_rope = partial(_qk_norm_rope, impl="reference")
qk_norm_rope_append = partial(_qk_norm_rope_append, impl="reference")
ada_layer_norm = partial(_ada_layer_norm, impl="reference")
layer_norm = partial(_layer_norm, impl="reference")
gated_residual = partial(_gated_residual, impl="reference")
gated_residual_ada_layer_norm = partial(_gated_residual_ada_layer_norm, impl="reference")
gated_residual_layer_norm = partial(_gated_residual_layer_norm, impl="reference")
rms_norm = partial(_rms_norm, impl="reference")
flow_step = partial(_flow_step, impl="reference")
ring_advance = partial(_ring_advance, impl="reference")
rms_silu_pad = partial(_rms_silu_pad, impl="reference")
