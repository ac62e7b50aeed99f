"""gated_residual: one op, see api.py."""

from .api import gated_residual

__all__ = ["gated_residual"]
