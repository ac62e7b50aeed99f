"""attention_fp8: attention over keys and values in 8 bits, see api.py."""

from .api import attention_fp8

__all__ = ["attention_fp8"]
