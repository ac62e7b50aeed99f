"""rms_norm: one op, see api.py."""

from .api import rms_norm

__all__ = ["rms_norm"]
