"""append_fp8, qk_norm_rope_append_fp8: see api.py."""

from .api import append_fp8, qk_norm_rope_append_fp8

__all__ = ["append_fp8", "qk_norm_rope_append_fp8"]
