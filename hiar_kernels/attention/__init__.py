"""Attention by absolute frame ids."""

from .api import attention, takes_layout
from .layout import AttentionLayout, attention_layout
from .mask import EMPTY, BlockCausal, KVContext

__all__ = ["EMPTY", "AttentionLayout", "BlockCausal", "KVContext", "attention", "attention_layout", "takes_layout"]
