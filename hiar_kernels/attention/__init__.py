"""Attention by absolute frame ids."""

from .api import attention
from .mask import EMPTY, BlockCausal, KVContext

__all__ = ["EMPTY", "BlockCausal", "KVContext", "attention"]
