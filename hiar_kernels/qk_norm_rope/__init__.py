"""RMSNorm of q and k and 3D RoPE, functional or straight into a ring of cache slots."""

from .api import qk_norm_rope, qk_norm_rope_append

__all__ = ["qk_norm_rope", "qk_norm_rope_append"]
