"""Ring state of every step moved on by one visit, on the device."""

from .api import ring_advance

__all__ = ["ring_advance"]
