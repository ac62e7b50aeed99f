"""One forward of a Wan transformer in plain PyTorch: what anyone would write first, and the baseline of `anchors.py`.

Its blocks only: own keys and values go into the last slots of a ring over the whole window, text keys are constant.
Patches, time embedding and head (under 1% of the work) are left out. Weights and inputs are random.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.ops.work import Sizes

DTYPE = torch.bfloat16
EPS = 1e-6


class PlainBlock(nn.Module):
    """In three parts, with self- and cross-attention between them: these are launched from outside, by any library.

    x [B, T, width]; e [B, frames, 6, width], the time embedding; cos, sin [T, 1, head_dim / 2].
    """

    def __init__(self, z: Sizes):
        super().__init__()
        width, ffn = z.width, z.ffn
        self.split_heads, self.split_frames = (z.heads, z.head_dim), (z.block, -1)
        self.modulation = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = nn.RMSNorm(width, EPS), nn.RMSNorm(width, EPS)
        self.cross_norm = nn.LayerNorm(width, EPS)
        self.cross_q, self.cross_o = nn.Linear(width, width), nn.Linear(width, width)
        self.cross_norm_q = nn.RMSNorm(width, EPS)
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def before(self, x: Tensor, e: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of self-attention, [B, T, heads, head_dim]."""
        shift, scale, *_ = self._six(e)
        q, k, v = self.qkv(self._modulated(x, shift, scale)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, self.split_heads) for y in (self.norm_q(q), self.norm_k(k), v))
        return self._rotated(q, cos, sin), self._rotated(k, cos, sin), v

    def between(self, x: Tensor, e: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """x after self-attention, and the queries of cross-attention."""
        x = self._gated(x, self._six(e)[2], self.o(seen.flatten(2)))
        return x, self.cross_norm_q(self.cross_q(self.cross_norm(x))).unflatten(-1, self.split_heads)

    def after(self, x: Tensor, e: Tensor, read: Tensor) -> Tensor:
        """x after cross-attention and the feed-forward layers."""
        x = x + self.cross_o(read.flatten(2))
        *_, shift, scale, gate = self._six(e)
        return self._gated(x, gate, self.down(F.gelu(self.up(self._modulated(x, shift, scale)), approximate="tanh")))

    def _six(self, e: Tensor) -> tuple[Tensor, ...]:  # shift, scale, gate, twice: [B, frames, 1, width]
        return (e + self.modulation.float()).unsqueeze(2).unbind(3)

    def _modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        h = F.layer_norm(x.float(), x.shape[-1:], eps=EPS).unflatten(1, self.split_frames)
        return (h * (1 + scale) + shift).flatten(1, 2).to(x.dtype)

    def _gated(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        return (x.float() + (y.float().unflatten(1, self.split_frames) * gate).flatten(1, 2)).to(x.dtype)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


PARTS = (PlainBlock.before, PlainBlock.between, PlainBlock.after)  # eager; a compiled triple stands in for it


class PlainTransformer:
    """All blocks over their rings. Calling it twice gives the same: the same slots are written with the same values."""

    def __init__(self, z: Sizes, batch: int, device: str):
        torch.manual_seed(0)
        self.tokens = z.tokens
        with torch.device(device):
            self.blocks = [PlainBlock(z).to(DTYPE) for _ in range(z.layers)]
            self.rings, self.prompts = (
                [[torch.randn(batch, n, z.heads, z.head_dim, dtype=DTYPE) for _ in "kv"] for _ in range(z.layers)]
                for n in (z.window * z.frame_tokens, z.text_tokens)
            )
            self.x = torch.randn(batch, z.tokens, z.width, dtype=DTYPE)
            self.e = torch.randn(batch, z.block, 6, z.width)
            angle = torch.rand(z.tokens, 1, z.head_dim // 2) * 6  # which angles does not matter here
            self.cos, self.sin = angle.cos(), angle.sin()

    def __call__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], parts: tuple[Callable, ...]) -> Tensor:
        before, between, after = parts
        x = self.x
        for block, ring, text in zip(self.blocks, self.rings, self.prompts):
            q, *own = before(block, x, self.e, self.cos, self.sin)
            for slots, new in zip(ring, own):
                slots[:, -self.tokens :].copy_(new)
            x, q = between(block, x, self.e, attend(q, *ring))
            x = after(block, x, self.e, attend(q, *text))
        return x
