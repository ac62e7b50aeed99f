"""cross_attention: one op, see api.py."""

from .api import cross_attention

__all__ = ["cross_attention"]
