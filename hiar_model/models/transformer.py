"""The Wan2.1 text-to-video transformer with per-frame timesteps.

Shapes: B batch, F latent frames, P tokens of a frame, T = F P tokens, C width, H heads, D head width, L text tokens.
State-dict keys and shapes are the published ones; q, k, v are fused into one projection by load and save hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiar_kernels import (
    BlockCausal,
    KVContext,
    ada_layer_norm,
    ada_layer_norm_quantized,
    attention,
    gated_residual_ada_layer_norm,
    gated_residual_ada_layer_norm_quantized,
    gated_residual_layer_norm,
    quantize_rows,
    rms_norm,
)
from hiar_kernels.nvtx import span

from ..config import WanConfig
from .conditions import CrossAttentionKV, Modulation, ModulationTable, OutputSelection
from .self_attention import ATTENTION_MODES, DenseAttention, SelfAttention


def _normal(*shape: int) -> nn.Parameter:
    """Normal, divided by the root of the width. Not drawn on the meta device: torch would import its compiler for that,
    which takes longer than generating a short video with the toy model.
    """
    x = torch.empty(shape)
    return nn.Parameter(x if x.is_meta else x.normal_().div_(shape[-1] ** 0.5))


class SelfAttentionLayer(nn.Module):
    """The weights of self-attention: fused q, k, v projection, full-width RMSNorms, output projection."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self._register_load_state_dict_pre_hook(_fuse_qkv)
        self.register_state_dict_post_hook(_split_qkv)


_KINDS = "weight", "bias", "weight_scale"  # the last of a layer in 8 bits


def _fuse_qkv(state: dict[str, Any], prefix: str, *_: Any) -> None:
    for kind in _KINDS:
        keys = [f"{prefix}{part}.{kind}" for part in "qkv"]
        if all(key in state for key in keys):
            state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(key) for key in keys])


def _split_qkv(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for kind in _KINDS:
        if (fused := state.pop(f"{prefix}qkv.{kind}", None)) is not None:
            state |= {f"{prefix}{part}.{kind}": value for part, value in zip("qkv", fused.chunk(3), strict=True)}


class CrossAttention(nn.Module):
    """Attention to the prompt, whose keys and values :meth:`HiARTransformer.cross_attention_kv` computes once."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)

    def kv(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded prompt [B, L, C] -> k, v [B, L, H, D]."""
        split = (self.heads, -1)
        k = rms_norm(self.k(embedded), self.norm_k.weight, eps=self.eps)
        return k.unflatten(-1, split), self.v(embedded).unflatten(-1, split)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, counts: Tensor | None) -> Tensor:
        """x [B, T, C] -> [B, T, C]. ``counts``: how often each key occurs; None: once each."""
        q = rms_norm(self.q(x), self.norm_q.weight, eps=self.eps).unflatten(-1, (self.heads, -1))
        k, v = k.to(q.dtype).expand(len(q), -1, -1, -1), v.to(q.dtype).expand(len(q), -1, -1, -1)
        return self.o(attention(q, k, v, kv_counts=counts).flatten(2))


class DeferredResidual(NamedTuple):
    """y [B, T, C] times gate [B, F, C] (None: 1), not added to x yet: the next norm adds it, in one kernel."""

    y: Tensor
    gate: Tensor | None


RowsDtype = torch.dtype | None
QuantizedRows = tuple[Tensor, Tensor]
"""What a linear layer in 8 bits takes: e4m3 or int8 [..., C] and a scale for each row, float32 [...]."""


def rows_dtype(layer: nn.Module) -> RowsDtype:
    """The dtype of :data:`QuantizedRows` that a linear layer takes; None: a tensor in full, as beside a LoRA branch."""
    return None if layer._forward_hooks else getattr(layer, "rows_dtype", None)


def add_residual_and_norm(
    x: Tensor, residual: DeferredResidual | None, shift: Tensor, scale: Tensor, eps: float, to: RowsDtype = None
) -> tuple[Tensor, Any]:
    """x plus the deferred residual, and the modulated norm of the sum: a tensor, or with ``to``
    :data:`QuantizedRows` of that dtype."""
    if to is not None:
        if residual is None:
            return x, ada_layer_norm_quantized(x, shift, scale, eps=eps, dtype=to)
        y, gate = residual
        x, *normed = gated_residual_ada_layer_norm_quantized(x, y, gate, shift, scale, eps=eps, dtype=to)
        return x, tuple(normed)
    if residual is None:
        return x, ada_layer_norm(x, shift, scale, eps=eps)
    return gated_residual_ada_layer_norm(x, residual.y, residual.gate, shift, scale, eps=eps)


class Block(nn.Module):
    """One transformer block (Wan2.1): modulated self-attention, cross-attention, feed-forward."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttentionLayer(config)
        self.cross_attn = CrossAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = _normal(1, 6, config.dim)

    def forward(
        self,
        x: Tensor,
        residual: DeferredResidual | None,
        modulation: Modulation | ModulationTable,
        prompt: CrossAttentionKV,
        layer: int,
        attend: SelfAttention,
        selection: OutputSelection | None,
    ) -> tuple[Tensor, DeferredResidual, Modulation | ModulationTable] | None:
        """x [B, T, C] and its deferred residual -> both after this block, of the selection, and its modulation; None
        if the selection is empty.
        """
        own = self.self_attn
        with span("qkv"):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.of_layer(layer, self.modulation)
            x, normed = add_residual_and_norm(x, residual, shift1, scale1, self.eps, rows_dtype(own.qkv))
            qkv = own.qkv(normed)
        with span("self-attention"):
            attended = attend(layer, qkv, own.norm_q.weight, own.norm_k.weight, selection)
        if attended is None:
            return None
        k, v = prompt.of(layer, self.cross_attn.kv)
        counts = prompt.counts if prompt.counted else None
        if selection is not None:
            x = selection.tokens(x, x.shape[1] // modulation.frames)
            modulation = modulation.select(selection)
            _, _, gate1, shift2, scale2, gate2 = modulation.of_layer(layer, self.modulation)
            k, v = selection.of_batch(k), selection.of_batch(v)
            counts = None if counts is None else selection.of_batch(counts)
        with span("output"):
            norm = self.norm3
            x, normed = gated_residual_layer_norm(
                x, own.o(attended.flatten(2)), gate1, norm.weight, norm.bias, eps=self.eps
            )
        with span("cross-attention"):
            cross = self.cross_attn(normed, k, v, counts)
        with span("feed-forward"):
            dtype = rows_dtype(self.ffn[0])
            x, normed = add_residual_and_norm(x, DeferredResidual(cross, None), shift2, scale2, self.eps, dtype)
            return x, DeferredResidual(self._feed_forward(normed), gate2), modulation

    def _feed_forward(self, x: Any) -> Tensor:
        """Of x [B, T, C], or of :data:`QuantizedRows` if the first layer takes it."""
        up, _, down = self.ffn
        if (dtype := rows_dtype(down)) is not None:
            return down(quantize_rows(up(x), activation="gelu_tanh", dtype=dtype))
        if hasattr(up, "rows_dtype"):
            return self.ffn[1:](up(x))
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled("cuda")
        if half and not torch.is_grad_enabled() and not up._forward_hooks:  # a LoRA branch is one
            # Bias and tanh-GELU in the matmul's epilogue (cuBLASLt). On a CPU this function computes the erf GELU.
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

    def forward(self, x: Tensor, residual: DeferredResidual, modulation: Modulation | ModulationTable) -> Tensor:
        shift, scale = modulation.of_head(self.modulation)
        return self.head(add_residual_and_norm(x, residual, shift, scale, self.eps)[1])


class HiARTransformer(nn.Module):
    """Wan2.1 text-to-video transformer that predicts the velocity eps - x0, one timestep for each latent frame.

    State-dict keys are the published ones (``blocks.0.self_attn.q.weight``, ...); :func:`hiar_model.load_transformer`
    reads weights. Architecture: Wan Team 2025, arXiv:2503.20314.

    Args:
        each_block: what becomes of each block once it is made, before the next one is made.

    >>> config = WanConfig(dim=24, ffn_dim=48, num_layers=1, num_heads=2, in_channels=4, out_channels=4, text_dim=8)
    >>> model = HiARTransformer(config)
    >>> latents, prompt_embeds = torch.randn(1, 3, 4, 4, 6), torch.randn(1, 5, 8)
    >>> model(latents, torch.tensor([500.0]), prompt_embeds, attention="block_causal", frames_per_block=1).shape
    torch.Size([1, 3, 4, 4, 6])
    """

    def __init__(self, config: WanConfig, each_block: Callable[[Block], Block] = lambda block: block) -> None:
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
        self.blocks = nn.ModuleList(each_block(Block(config)) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
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
            prompt_embeds: [B or 1, L, text_dim], L <= text_len. Missing tokens count as zeros, which take part in
                cross-attention as in Wan's code.
            attention: "bidirectional", or "block_causal" with frames_per_block, window_frames, sink_frames
                (:class:`hiar_kernels.BlockCausal`).
            first_frame: absolute id of the first frame of ``latents``.
            context: keys and values of earlier frames, from :meth:`kv`, one for each layer.
            video_start: id of the video's first frame, from which blocks and the sink are counted; default: 0 with a
                context, ``first_frame`` without.

        Returns:
            [B, F, C, H, W], dtype of the weights.

        Raises:
            ValueError: shapes that do not fit each other or the configuration, an unknown ``attention``.
        """
        if video_start is None:
            video_start = first_frame if context is None else 0
        self._check_shapes(latents, timesteps, prompt_embeds)
        rule = (frames_per_block, window_frames, sink_frames, video_start)
        attend = self._dense_attention(latents, attention, *rule, first_frame, context)
        out = self.run(latents, self.modulation(timesteps, latents.shape[1]), self.embed_prompt(prompt_embeds), attend)
        assert out is not None
        return out

    def kv(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        attention: str = "block_causal",
        frames_per_block: int = 3,
        window_frames: int | None = None,
        sink_frames: int = 0,
        first_frame: int = 0,
    ) -> list[KVContext]:
        """Keys and values of every frame, one :class:`hiar_kernels.KVContext` for each layer; differentiable.

        Arguments are those of :meth:`forward`; nothing behind the last layer's keys is computed.
        """
        self._check_shapes(latents, timesteps, prompt_embeds)
        rule = (frames_per_block, window_frames, sink_frames, first_frame)
        attend = self._dense_attention(latents, attention, *rule, first_frame, None, True)
        modulation, prompt = self.modulation(timesteps, latents.shape[1]), self.embed_prompt(prompt_embeds)
        self.run(latents, modulation, prompt, attend, OutputSelection(()))
        assert attend.collected is not None
        return attend.collected

    def _check_shapes(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> None:
        for name, tensor in (("latents", latents), ("timesteps", timesteps), ("prompt_embeds", prompt_embeds)):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if latents.dim() != 5 or latents.shape[2] != self.config.in_channels:
            raise ValueError(f"latents must be [B, F, {self.config.in_channels}, H, W], got {list(latents.shape)}")
        batch, frames = latents.shape[:2]
        if batch < 1 or frames < 1:
            raise ValueError(f"latents must hold at least one video of one frame, got {list(latents.shape)}")
        per_frame = timesteps.dim() == 2 and timesteps.shape[1] == frames
        if not (per_frame or timesteps.dim() == 1) or timesteps.shape[0] != batch:
            raise ValueError(f"timesteps must be [{batch}, {frames}] or [{batch}], got {list(timesteps.shape)}")
        if prompt_embeds.dim() != 3 or prompt_embeds.shape[0] not in (1, batch):
            legal, shape = f"[1 or {batch}, L, {self.config.text_dim}]", list(prompt_embeds.shape)
            raise ValueError(f"prompt_embeds must be {legal}, got {shape}")

    def _dense_attention(
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
    ) -> DenseAttention:
        if mode not in ATTENTION_MODES:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION_MODES)}, got {mode!r}")
        if context is not None and (isinstance(context, str) or len(context) != len(self.blocks)):
            got = repr(context) if isinstance(context, str) else len(context)
            raise ValueError(f"context must hold a KVContext for each of {len(self.blocks)} layers, got {got}")
        grid = self.config.grid(*latents.shape[3:])
        last = first + latents.shape[1]
        frames = torch.arange(first, last, device=latents.device)[None]
        # torch.compile would specialise on the length of a range, and has no use for ids on the host.
        host_frames = None if torch.compiler.is_compiling() else [range(first, last)]
        mask = None
        if mode == "block_causal":
            mask = BlockCausal(grid[0] * grid[1], block, window, sink, start)
        return DenseAttention(self.config, grid, frames, mask, context, collect, host_frames)

    def run(
        self,
        latents: Tensor,
        modulation: Modulation | ModulationTable,
        prompt: CrossAttentionKV,
        attend: SelfAttention,
        selection: OutputSelection | None = None,
    ) -> Tensor | None:
        """The forward, with self-attention done by ``attend``.

        Args:
            latents: [B, F, C, H, W]. selection: the batch items and frames whose velocity is computed; None: all.
                Keys and values of the last layer are computed for every frame.

        Returns:
            Velocity [b, f, C, H, W] of the selection; None if it is empty.
        """
        grid = self.config.grid(*latents.shape[3:])
        x, residual = attend.share(self.patchify(latents), latents.shape[1]), None
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            with span("layer", i):
                result = block(x, residual, modulation, prompt, i, attend, selection if i == last else None)
            if result is None:
                return None
            x, residual, modulation = result
        velocity = attend.join(self.head(x, residual, modulation), modulation.frames)
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
        """timesteps [B, F] or [B] -> :class:`Modulation` of F frames. The sinusoid is float64, cosines first."""
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
        """timesteps [B, F] -> the modulation of every layer, valid while the weights stay as they are; no gradient."""
        modulation = self.modulation(timesteps, timesteps.shape[1])
        vectors = [x for i, block in enumerate(self.blocks) for x in modulation.of_layer(i, block.modulation)]  # type: ignore[arg-type]
        return ModulationTable(torch.stack([*vectors, *modulation.of_head(self.head.modulation)], 2))

    def embed_prompt(self, prompt_embeds: Tensor) -> CrossAttentionKV:
        """[B, L, text_dim] -> the embedded prompt, for training; all padding is one token with a count."""
        length, full = prompt_embeds.shape[1], self.config.text_len
        if length > full or prompt_embeds.shape[2] != self.config.text_dim:
            legal, shape = f"[B, at most {full}, {self.config.text_dim}]", list(prompt_embeds.shape)
            raise ValueError(f"prompt_embeds must be {legal}, got {shape}")
        counts = torch.ones(1, length, dtype=torch.float32, device=prompt_embeds.device)
        if length < full:
            prompt_embeds = F.pad(prompt_embeds, (0, 0, 0, 1))
            counts = F.pad(counts, (0, 1), value=float(full - length))
        embedded = self.text_embedding(prompt_embeds.to(self.patch_embedding.weight.dtype))
        return CrossAttentionKV((), counts, embedded, counted=length < full)

    def cross_attention_kv(self, prompt_embeds: Tensor) -> CrossAttentionKV:
        """[B, L, text_dim] -> the prompt's keys and values of every layer, computed once for a whole rollout."""
        prompt = self.embed_prompt(prompt_embeds)
        assert prompt.embedded is not None
        project: list[Callable[[Tensor], tuple[Tensor, Tensor]]] = [block.cross_attn.kv for block in self.blocks]  # type: ignore[union-attr,misc]
        return CrossAttentionKV(tuple(kv(prompt.embedded) for kv in project), prompt.counts, counted=prompt.counted)
