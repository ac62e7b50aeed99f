"""quantize_rows: one op, see api.py."""

from .api import quantize_rows

__all__ = ["quantize_rows"]
