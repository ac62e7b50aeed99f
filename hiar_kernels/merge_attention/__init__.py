"""Exact merge of partial attentions."""

from .api import merge_attention

__all__ = ["merge_attention"]
