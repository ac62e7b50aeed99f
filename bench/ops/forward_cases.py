"""The pointwise work of a whole forward: the model's own blocks with every matmul and every attention taken out.

What those would hand over lies ready. To the compiler each is a border it cannot look across, as it is in a real
forward: nothing is fused that could not be. On a GPU all layers are captured in one CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import hiar_kernels
from bench.lib.measure import Bench, captured
from bench.ops.work import Sizes, Work, ids
from hiar_kernels import qk_norm_rope_append, rms_norm
from hiar_model.config import WanConfig
from hiar_model.models import transformer
from hiar_model.models.conditions import CrossAttentionKV, ModulationTable, OutputSelection
from hiar_model.models.self_attention import SelfAttention
from hiar_model.models.transformer import Block, Head

GOAL_MS = 2.5  # of a forward of Wan 1.3B on an H200, inside the graph


class Ready(nn.Module):
    """Stands for a matmul or an attention: takes what it would take, hands out what lies ready."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.out = out
        self.forward = torch.compiler.disable(self.ready)  # here, and not above: it imports the compiler

    def ready(self, *_: Tensor) -> Tensor:
        return self.out


class Cross(transformer.CrossAttention):
    """Without its attention."""

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return self.o(rms_norm(self.q(x), self.norm_q.weight, eps=self.eps))


class Append(SelfAttention):
    """Self-attention without its attention: norm, rotate, write into the ring."""

    def __init__(self, bench: Bench, z: Sizes, attended: Tensor):
        self.z, self.attended = z, Ready(attended)
        ring = (1, z.window * z.frame_tokens, z.heads, z.head_dim)
        self.rings = {"k_cache": bench.normal(*ring), "v_cache": bench.normal(*ring)}
        self.frames = ids(bench, [z.window - 1 + i for i in range(z.block)])  # wraps
        self.slots = self.frames % z.window

    def __call__(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, selection: OutputSelection | None
    ) -> Tensor:
        q = qk_norm_rope_append(
            qkv, q_weight, k_weight, self.frames, self.slots, num_heads=self.z.heads, grid=self.z.grid, **self.rings
        )
        return self.attended(q)


class Emptied(Block):
    """A block with its linear layers replaced, the GELU between them only where asked."""

    def __init__(self, bench: Bench, z: Sizes, config: WanConfig, gelu: bool):
        super().__init__(config)

        def ready(width: int) -> Ready:
            return Ready(bench.normal(1, z.tokens, width))

        self.self_attn.qkv, self.self_attn.o = ready(3 * z.width), ready(z.width)
        self.cross_attn = Cross(config)
        self.cross_attn.q, self.cross_attn.o = ready(z.width), ready(z.width)
        self.cross_attn.k = self.cross_attn.v = nn.Identity()  # the text's: not in a forward
        self.ffn = nn.Sequential(ready(z.ffn), nn.GELU("tanh") if gelu else nn.Identity(), ready(z.width))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


def forward_pointwise(bench: Bench, z: Sizes, gelu: bool = False) -> Work:
    """All layers, by "eager", "compiled", or kernels of ours: "triton"; "cuda" where there are any, else Triton's.

    The GELU only where asked: a matmul may have it as epilogue.
    """
    x = bench.normal(1, z.tokens, z.width)
    attend = Append(bench, z, bench.normal(1, z.tokens, z.heads, z.head_dim))
    config = WanConfig(dim=z.width, ffn_dim=z.ffn, num_heads=z.heads, num_layers=z.layers)
    with torch.device(bench.device):
        block, head = Emptied(bench, z, config, gelu), Head(config)
    head.head = nn.Identity()
    block, head = (m.to(torch.bfloat16).requires_grad_(False) for m in (block, head))
    modulation = ModulationTable(bench.normal(1, z.block, 8, z.width))  # of one layer, and the head
    text = CrossAttentionKV(((x, x),), x)  # nobody reads it

    def layers(one: Callable, last: Callable) -> Tensor:
        y, pending = x, None
        for _ in range(z.layers):
            y, pending, *_ = one(y, pending, modulation, text, 0, attend, None)
        return last(y, pending, modulation)

    @functools.cache  # captured once
    def variant(name: str) -> Callable[[], Tensor]:
        parts = [bench.compiled(m) if name == "compiled" else m for m in (block, head)]

        def run() -> Tensor:
            with hiar_kernels.prefer("reference" if name in ("eager", "compiled") else name):
                return layers(*parts)

        return captured(run) if bench.cuda else run

    # One pass over memory from matmul to matmul, in parts as large as x: a residual and the norm after it 4, three
    # times; queries, keys and values 6; the norm of the text's queries 2.
    moved = z.layers * x.nbytes * (3 * 4 + 6 + 2 + (2 * z.ffn / z.width if gelu else 0))
    return Work([], lambda name: variant(name)(), moved)
