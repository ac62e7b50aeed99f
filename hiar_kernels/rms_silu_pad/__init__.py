"""rms_silu_pad: one op, see api.py."""

from .api import rms_silu_pad

__all__ = ["rms_silu_pad"]
