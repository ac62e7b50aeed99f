"""Attention by absolute frame ids."""

from .api import attention, attention_with_lse, takes_layout, takes_schedule
from .gluon import attention_schedule
from .layout import AttentionLayout, attention_layout
from .mask import EMPTY, BlockCausal, KVContext
from .schedule import AttentionSchedule

__all__ = [
    "EMPTY",
    "AttentionLayout",
    "AttentionSchedule",
    "BlockCausal",
    "KVContext",
    "attention",
    "attention_with_lse",
    "attention_layout",
    "attention_schedule",
    "takes_layout",
    "takes_schedule",
]
