"""layer_norm: one op, see api.py."""

from .api import layer_norm

__all__ = ["layer_norm"]
