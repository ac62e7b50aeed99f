"""The Wan2.1 text-to-video transformer with per-frame timesteps.

Shapes: B batch, F latent frames, P tokens of a frame, T = F P tokens, C width, H heads, D head width, L text tokens.
State-dict keys and shapes are the published ones; q, k, v are fused into one projection by load and save hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiar_kernels import (
    BlockCausal,
    KVContext,
    ada_layer_norm,
    attention,
    attention_layout,
    gated_residual_ada_layer_norm,
    gated_residual_layer_norm,
    qk_norm_rope,
    rms_norm,
)
from hiar_kernels.nvtx import span

from ..config import WanConfig
from .conditions import Live, Modulation, ModulationTable, TextKV

ATTENTION_MODES = ("bidirectional", "block_causal")


class Attend(Protocol):
    """Self-attention of one layer: norm, rotate, store or collect the keys, attend.

    Where several processes share a forward, each has a share of every frame's tokens outside of it.
    """

    def __call__(self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, live: Live | None) -> Tensor | None:
        """qkv [B, T, 3 C] -> [b, t, H, D] for the live part; None if nothing is live."""

    def share(self, x: Tensor, frames: int) -> Tensor:
        """Whole x [B, T, C] -> this process's share of every frame's tokens."""
        return x

    def join(self, x: Tensor, frames: int) -> Tensor:
        """A share of x -> the whole, from the shares of all processes."""
        return x


def _normal(*shape: int) -> nn.Parameter:
    """Normal numbers over the root of the width. On the meta device nothing is drawn: torch would load its compiler for
    that, which takes longer than making a short video of the toy.
    """
    x = torch.empty(shape)
    return nn.Parameter(x if x.is_meta else x.normal_().div_(shape[-1] ** 0.5))


class SelfAttention(nn.Module):
    """Fused q, k, v projection, full-width RMSNorm weights, output projection."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self._register_load_state_dict_pre_hook(_fuse_qkv)
        self.register_state_dict_post_hook(_split_qkv)


def _fuse_qkv(state: dict[str, Any], prefix: str, *_: Any) -> None:
    for kind in ("weight", "bias"):
        keys = [f"{prefix}{part}.{kind}" for part in "qkv"]
        if all(key in state for key in keys):
            state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(key) for key in keys])


def _split_qkv(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for kind in ("weight", "bias"):
        for part, value in zip("qkv", state.pop(f"{prefix}qkv.{kind}").chunk(3), strict=True):
            state[f"{prefix}{part}.{kind}"] = value


class CrossAttention(nn.Module):
    """Attention to the prompt; its keys and values are computed once, by :meth:`HiARTransformer.text_kv`."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)

    def kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, L, C] -> k, v [B, L, H, D]."""
        split = (self.heads, -1)
        k = rms_norm(self.k(text), self.norm_k.weight, eps=self.eps)
        return k.unflatten(-1, split), self.v(text).unflatten(-1, split)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, counts: tuple[Tensor, Tensor] | None) -> Tensor:
        """``counts`` of the keys and their logarithms; None: each occurs once."""
        q = rms_norm(self.q(x), self.norm_q.weight, eps=self.eps).unflatten(-1, (self.heads, -1))
        k, v = k.to(q.dtype).expand(len(q), -1, -1, -1), v.to(q.dtype).expand(len(q), -1, -1, -1)
        times, logs = (None, None) if counts is None else (counts[0], counts[1].to(q.dtype))
        out = attention(q, k, v, kv_counts=times, kv_log_counts=logs)
        assert isinstance(out, Tensor)
        return self.o(out.flatten(2))


class Pending(NamedTuple):
    """A residual that is still to be added, y [B, T, C] times gate [B, F, C] (None: 1): together with the norm that
    follows, which then has it in registers.
    """

    y: Tensor
    gate: Tensor | None


def _settle(x: Tensor, pending: Pending | None, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with what is pending added, and its modulated norm."""
    if pending is None:
        return x, ada_layer_norm(x, shift, scale, eps=eps)
    return gated_residual_ada_layer_norm(x, pending.y, pending.gate, shift, scale, eps=eps)


class Block(nn.Module):
    """One transformer block (Wan2.1): modulated self-attention, cross-attention, feed-forward."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = _normal(1, 6, config.dim)

    def forward(
        self,
        x: Tensor,
        pending: Pending | None,
        modulation: Modulation | ModulationTable,
        text: TextKV,
        layer: int,
        attend: Attend,
        live: Live | None,
    ) -> tuple[Tensor, Pending, Modulation | ModulationTable] | None:
        """x [B, T, C] and what is still to be added to it -> the same after this block, of the live part, with the
        modulation that goes with it; None if nothing is live.
        """
        own = self.self_attn
        with span("qkv"):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.of_layer(layer, self.modulation)
            x, normed = _settle(x, pending, shift1, scale1, self.eps)
            qkv = own.qkv(normed)
        with span("self-attention"):
            attended = attend(layer, qkv, own.norm_q.weight, own.norm_k.weight, live)
        if attended is None:
            return None
        k, v = text.of(layer, self.cross_attn.kv)
        counts = (text.counts, text.log_counts) if text.counted else None
        if live is not None:
            x = live.tokens(x, x.shape[1] // modulation.frames)
            modulation = modulation.select(live)
            _, _, gate1, shift2, scale2, gate2 = modulation.of_layer(layer, self.modulation)
            k, v = live.of_rows(k), live.of_rows(v)
            counts = None if counts is None else (live.of_rows(counts[0]), live.of_rows(counts[1]))
        with span("output"):
            norm = self.norm3
            x, normed = gated_residual_layer_norm(
                x, own.o(attended.flatten(2)), gate1, norm.weight, norm.bias, eps=self.eps
            )
        with span("cross-attention"):
            cross = self.cross_attn(normed, k, v, counts)
        with span("feed-forward"):
            x, normed = _settle(x, Pending(cross, None), shift2, scale2, self.eps)
            return x, Pending(self._feed_forward(normed), gate2), modulation

    def _feed_forward(self, x: Tensor) -> Tensor:
        up, _, down = self.ffn
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        half = x.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(x.device.type)
        if x.is_cuda and half and not torch.is_grad_enabled():
            # bias and tanh-GELU in the matmul's epilogue (cuBLASLt); on a CPU the same function is the other GELU
            hidden = torch._addmm_activation(up.bias, x.flatten(0, 1), up.weight.t(), use_gelu=True)
            return down(hidden.unflatten(0, x.shape[:2]))
        return self.ffn(x)


class Head(nn.Module):
    """Modulated norm and projection back to latent patches."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        _, ph, pw = config.patch_size
        self.eps = config.eps
        self.head = nn.Linear(config.dim, ph * pw * config.out_channels)
        self.modulation = _normal(1, 2, config.dim)

    def forward(self, x: Tensor, pending: Pending, modulation: Modulation | ModulationTable) -> Tensor:
        shift, scale = modulation.of_head(self.modulation)
        return self.head(_settle(x, pending, shift, scale, self.eps)[1])


class FullSequence(Attend):
    """:class:`Attend` over whole sequences: training, teachers, oracles. Keeps keys and values if asked.

    Args:
        frames: ids [B or 1, F]. host_frames: the same on the host. With them, and those of the context, ``layout`` is
            known to all layers, and attention may go by a library.
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
        seen = context[0].host_frames if context else None
        known = mask is not None and host_frames is not None and (seen is not None or not context)
        if known and not torch.compiler.is_compiling():
            assert mask is not None and host_frames is not None
            self.layout = attention_layout(mask, host_frames, host_frames, seen)
        self.collected: list[KVContext] | None = [] if collect else None

    def __call__(self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, live: Live | None) -> Tensor | None:
        c = self.config
        q, k, v = qk_norm_rope(
            qkv, q_weight, k_weight, self.frames, num_heads=c.num_heads, grid=self.grid, eps=c.eps, theta=c.rope_theta
        )
        if self.collected is not None:
            self.collected.append(KVContext(k, v, self.frames, host_frames=self.host_frames))
        if live is not None:
            return None
        ids = None if self.mask is None else self.frames
        context = None if self.context is None else self.context[layer]
        out = attention(q, k, v, mask=self.mask, q_frames=ids, kv_frames=ids, context=context, layout=self.layout)
        assert isinstance(out, Tensor)
        return out


class HiARTransformer(nn.Module):
    """Wan2.1 text-to-video transformer that predicts the velocity eps - x0, one timestep for each latent frame."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.position_embedding: nn.Parameter | None = None
        if config.position_grid is not None:
            self.position_embedding = _normal(math.prod(config.position_grid), dim)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        attention: str = "bidirectional",
        frames_per_block: int = 3,
        window_frames: int | None = None,
        sink_frames: int = 0,
        first_frame: int = 0,
        context: Sequence[KVContext] | None = None,
        video_start: int | None = None,
    ) -> Tensor:
        """Velocity of every frame.

        Args:
            latents: [B, F, C, H, W]. timesteps: [B, F] or [B], 1000 sigma; 0 is clean.
            text: [B, L, text_dim], L <= text_len; the rest counts as zero padding, which takes part.
            attention: "bidirectional", or "block_causal" with frames_per_block, window_frames, sink_frames
                (:class:`hiar_kernels.BlockCausal`).
            first_frame: absolute id of the first frame of ``latents``.
            context: what :meth:`kv` left, one for each layer: earlier blocks are seen there, not in ``latents``.
            video_start: id of the video's first frame, from which blocks and the sink are counted; default: 0 with a
                context, ``first_frame`` without.

        Returns:
            [B, F, C, H, W], dtype of the weights.
        """
        if video_start is None:
            video_start = first_frame if context is None else 0
        self._check_counts(latents, timesteps, text)
        rule = (frames_per_block, window_frames, sink_frames, video_start)
        attend = self._full(latents, attention, *rule, first_frame, context)
        out = self.run(latents, self.modulation(timesteps, latents.shape[1]), self.embed_text(text), attend)
        assert out is not None
        return out

    def kv(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        attention: str = "block_causal",
        frames_per_block: int = 3,
        window_frames: int | None = None,
        sink_frames: int = 0,
        first_frame: int = 0,
    ) -> list[KVContext]:
        """A forward only for its keys and values, one :class:`KVContext` for each layer; differentiable."""
        self._check_counts(latents, timesteps, text)
        rule = (frames_per_block, window_frames, sink_frames, first_frame)
        attend = self._full(latents, attention, *rule, first_frame, None, True)
        self.run(latents, self.modulation(timesteps, latents.shape[1]), self.embed_text(text), attend, Live(()))
        assert attend.collected is not None
        return attend.collected

    def _check_counts(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> None:
        """ValueError unless there are as many timesteps and texts as videos."""
        if latents.dim() != 5 or latents.shape[2] != self.config.in_channels:
            raise ValueError(f"latents must be [B, F, {self.config.in_channels}, H, W], got {list(latents.shape)}")
        batch, frames = latents.shape[:2]
        per_frame = timesteps.dim() == 2 and timesteps.shape[1] == frames
        if not (per_frame or timesteps.dim() == 1) or timesteps.shape[0] != batch:
            raise ValueError(f"timesteps must be [{batch}, {frames}] or [{batch}], got {list(timesteps.shape)}")
        if text.dim() != 3 or text.shape[0] not in (1, batch):
            raise ValueError(f"text must be [1 or {batch}, L, {self.config.text_dim}], got {list(text.shape)}")

    def _full(
        self,
        latents: Tensor,
        mode: str,
        block: int,
        window: int | None,
        sink: int,
        start: int,
        first: int,
        context: Sequence[KVContext] | None,
        collect: bool = False,
    ) -> FullSequence:
        if mode not in ATTENTION_MODES:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION_MODES)}, got {mode!r}")
        grid = self.config.grid(*latents.shape[3:])
        last = first + latents.shape[1]
        frames = torch.arange(first, last, device=latents.device)[None]
        # a range would fix the length of what torch.compile makes, where the ids on the host are of no use
        host_frames = None if torch.compiler.is_compiling() else [range(first, last)]
        mask = None
        if mode == "block_causal":
            mask = BlockCausal(grid[0] * grid[1], block, window, sink, start)
        return FullSequence(self.config, grid, frames, mask, context, collect, host_frames)

    def run(
        self,
        latents: Tensor,
        modulation: Modulation | ModulationTable,
        text: TextKV,
        attend: Attend,
        live: Live | None = None,
    ) -> Tensor | None:
        """The layers, with self-attention left to ``attend``.

        Args:
            latents: [B, F, C, H, W]. live: what is wanted beyond the last layer's keys and values; None: everything.

        Returns:
            Velocity [b, f, C, H, W] of the live part; None if nothing is live.
        """
        grid = self.config.grid(*latents.shape[3:])
        x, pending = attend.share(self.patchify(latents), latents.shape[1]), None
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            with span("layer", i):
                found = block(x, pending, modulation, text, i, attend, live if i == last else None)
            if found is None:
                return None
            x, pending, modulation = found
        velocity = attend.join(self.head(x, pending, modulation), modulation.frames)
        return self.unpatchify(velocity, grid)

    def patchify(self, latents: Tensor) -> Tensor:
        """[B, F, C, H, W] -> tokens [B, T, C]: the strided convolution as one matrix product."""
        _, ph, pw = self.config.patch_size
        b, f, c, h, w = latents.shape
        x = latents.to(self.patch_embedding.weight.dtype).reshape(b, f, c, h // ph, ph, w // pw, pw)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, f * (h // ph) * (w // pw), c * ph * pw)
        x = F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        if self.position_embedding is None:
            return x
        if self.config.position_grid != (h // ph, w // pw):
            raise ValueError(f"latents must have {self.config.position_grid} tokens a frame, got {(h // ph, w // pw)}")
        return (x.unflatten(1, (f, -1)) + self.position_embedding).flatten(1, 2)

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Head output [B, T, ph pw C] -> [B, F, C, H, W]."""
        _, ph, pw = self.config.patch_size
        c, (rows, columns) = self.config.out_channels, grid
        x = x.view(x.shape[0], -1, rows, columns, ph, pw, c).permute(0, 1, 6, 2, 4, 3, 5)
        return x.reshape(x.shape[0], x.shape[1], c, rows * ph, columns * pw)

    def modulation(self, timesteps: Tensor, frames: int) -> Modulation:
        """timesteps [B, F] or [B] -> :class:`Modulation`; the sinusoid is float64, cosines first."""
        t = timesteps if timesteps.dim() == 2 else timesteps[:, None].expand(-1, frames)
        half = self.config.freq_dim // 2
        base = torch.log(torch.tensor(10000.0, dtype=torch.float64))
        rates = torch.exp(-base * torch.arange(half, dtype=torch.float64) / half)
        angles = t.to(torch.float64)[..., None] * rates.to(t.device)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.patch_embedding.weight.dtype)
        embedding = self.time_embedding(sinusoid)
        return Modulation(embedding, self.time_projection(embedding).unflatten(-1, (6, -1)))

    @torch.no_grad()
    def modulation_table(self, timesteps: Tensor) -> ModulationTable:
        """timesteps [B, F] -> the modulation of every layer, for weights that stay as they are; without gradient."""
        made = self.modulation(timesteps, timesteps.shape[1])
        vectors = [x for i, block in enumerate(self.blocks) for x in made.of_layer(i, block.modulation)]  # type: ignore[arg-type]
        return ModulationTable(torch.stack([*vectors, *made.of_head(self.head.modulation)], 2))

    def embed_text(self, text: Tensor) -> TextKV:
        """Prompt [B, L, text_dim] -> what blocks make keys and values of; padding becomes one token with a count."""
        length, full = text.shape[1], self.config.text_len
        if length > full or text.shape[2] != self.config.text_dim:
            raise ValueError(f"text must be [B, at most {full}, {self.config.text_dim}], got {list(text.shape)}")
        counts = torch.ones(1, length, dtype=torch.float32, device=text.device)
        if length < full:
            text = F.pad(text, (0, 0, 0, 1))
            counts = F.pad(counts, (0, 1), value=float(full - length))
        embedded = self.text_embedding(text.to(self.patch_embedding.weight.dtype))
        return TextKV((), counts, embedded, counted=length < full)

    def text_kv(self, text: Tensor) -> TextKV:
        """Prompt [B, L, text_dim] -> its keys and values for every layer, made once for all tasks."""
        prompt = self.embed_text(text)
        assert prompt.embedded is not None
        kv: list[Callable[[Tensor], tuple[Tensor, Tensor]]] = [block.cross_attn.kv for block in self.blocks]  # type: ignore[union-attr,misc]
        return TextKV(tuple(project(prompt.embedded) for project in kv), prompt.counts, counted=prompt.counted)
