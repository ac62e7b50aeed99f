"""Self-attention of the transformer, as it is called, and over whole sequences; :mod:`.cached_attention` has the other.

Shapes: B batch, F latent frames, T tokens, C width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hiar_kernels import BlockCausal, KVContext, attention, attention_layout, qk_norm_rope

from ..config import WanConfig
from .conditions import OutputSelection

ATTENTION_MODES = ("bidirectional", "block_causal")


class SelfAttention(Protocol):
    """What the transformer calls for self-attention: normalise and rotate q and k, store or collect k and v, attend.

    :class:`DenseAttention` attends over the whole sequence, :class:`.cached_attention.CachedAttention` over a KV cache.
    Where several processes share a forward (Ulysses), each holds part of every frame's tokens outside of it.
    """

    def __call__(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, selection: OutputSelection | None
    ) -> Tensor | None:
        """qkv [B, T, 3 C] -> the attention output [b, t, H, D] of the selection; None if it is empty."""

    def share(self, x: Tensor, frames: int) -> Tensor:
        """x [B, T, C] -> this process's part of every frame's tokens [B, t, C]."""
        return x

    def join(self, x: Tensor, frames: int) -> Tensor:
        """The inverse of :meth:`share`, gathered from all processes."""
        return x


class DenseAttention(SelfAttention):
    """:class:`SelfAttention` over whole sequences: training, teachers, reference rollout.

    Args:
        grid: tokens of a frame, (rows, columns). frames: frame ids, int [B or 1, F], on the device.
        mask: None: bidirectional. context: keys and values of earlier frames, one for each layer.
        collect: keep the keys and values of each layer in ``collected``.
        host_frames: ``frames`` on the host. If the context has them too, all layers share one attention layout, which
            library kernels need.
    """

    def __init__(
        self,
        config: WanConfig,
        grid: tuple[int, int],
        frames: Tensor,
        mask: BlockCausal | None,
        context: Sequence[KVContext] | None = None,
        collect: bool = False,
        host_frames: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.config, self.grid, self.frames, self.mask, self.context = config, grid, frames, mask, context
        self.host_frames, self.layout = host_frames, None
        context_frames = context[0].host_frames if context else None
        known = host_frames is not None and (context_frames is not None or not context)
        if mask is not None and known and not torch.compiler.is_compiling():
            assert host_frames is not None
            self.layout = attention_layout(mask, host_frames, host_frames, context_frames)
        self.collected: list[KVContext] | None = [] if collect else None

    def __call__(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, selection: OutputSelection | None
    ) -> Tensor | None:
        c = self.config
        q, k, v = qk_norm_rope(
            qkv, q_weight, k_weight, self.frames, num_heads=c.num_heads, grid=self.grid, eps=c.eps, theta=c.rope_theta
        )
        if self.collected is not None:
            self.collected.append(KVContext(k, v, self.frames, host_frames=self.host_frames))
        if selection is not None:
            return None
        ids = None if self.mask is None else self.frames
        context = None if self.context is None else self.context[layer]
        return attention(q, k, v, mask=self.mask, q_frames=ids, kv_frames=ids, context=context, layout=self.layout)
