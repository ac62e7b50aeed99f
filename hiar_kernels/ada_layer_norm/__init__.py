"""ada_layer_norm: one op, see api.py."""

from .api import ada_layer_norm

__all__ = ["ada_layer_norm"]
