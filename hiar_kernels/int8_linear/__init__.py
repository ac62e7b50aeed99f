"""int8_linear: one op, see api.py."""

from .api import int8_linear

__all__ = ["int8_linear"]
