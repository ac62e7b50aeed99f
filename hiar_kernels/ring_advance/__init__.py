"""Advance the ring state of every step by one task, on the device."""

from .api import ring_advance

__all__ = ["ring_advance"]
