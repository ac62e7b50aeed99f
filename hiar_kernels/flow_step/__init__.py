"""flow_step: one op, see api.py."""

from .api import flow_step

__all__ = ["flow_step"]
