"""hiar_kernels.attention as an attention backend of diffusers."""

from __future__ import annotations

import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from hiar_kernels import BlockCausal, attention

NAME = "hiar"


def register_attention_backend() -> str:
    """Make :func:`hiar_kernels.attention` known to diffusers as the attention backend "hiar", and return that name.

    Any model of diffusers that dispatches its attention takes it then. It has no masks, dropout or grouped heads: a
    model that asks for one is refused when it runs. Calling it again changes nothing.

    diffusers lists its backends in an enumeration, which has no public way to add to; the name is put into its tables.

    Raises:
        ValueError: this version of diffusers keeps its backends in another way.

    Example:
        >>> from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
        >>> q = torch.randn(1, 6, 2, 16)
        >>> with attention_backend(register_attention_backend()):
        ...     dispatch_attention_fn(q, q, q).shape
        torch.Size([1, 6, 2, 16])
    """
    names = getattr(attention_dispatch, "AttentionBackendName", None)
    registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    if names is None or registry is None:
        import diffusers

        raise ValueError(
            f"diffusers {diffusers.__version__} has no table of attention backends that can be added to; tested with "
            "0.42.1: use apply_hiar_kernels(transformer)"
        )
    if NAME not in names._value2member_map_:
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        names._member_map_[NAME.upper()] = names._value2member_map_[NAME] = member
        names._member_names_.append(NAME.upper())
        registry.register(member)(_attention)
    return NAME


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: object = None,
) -> Tensor:
    """query [B, Tq, H, D], key and value [B, Tk, H, D] -> [B, Tq, H, D]: diffusers' protocol."""
    for name, refused in (
        ("attn_mask", attn_mask is not None), ("dropout_p", dropout_p and torch.is_grad_enabled()),
        ("enable_gqa", enable_gqa and key.shape[2] != query.shape[2]), ("context parallelism", _parallel_config),
    ):  # fmt: skip
        if refused:
            raise ValueError(f'attention backend "{NAME}" has no {name}: choose another for this model, as "native"')
    mask = BlockCausal(1, 1) if is_causal else None
    return attention(query, key, value, mask=mask, scale=scale)
