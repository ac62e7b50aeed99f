"""gated_residual_layer_norm: one op, see api.py."""

from .api import gated_residual_layer_norm

__all__ = ["gated_residual_layer_norm"]
