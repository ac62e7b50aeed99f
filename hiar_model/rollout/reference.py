"""HiAR on one page: hierarchical denoising (Zou et al. 2026, arXiv 2603.08703, section 3) in plain, eager PyTorch.

A few-step diffusion transformer makes a video block by block. A block is a few latent frames; it starts as noise, at
level sigma[0] = 1, and is denoised in S steps to sigma[S] = 0. It attends to itself and, through their keys and values
(KV), to the blocks before it. How noisy are those?

- Self-Forcing finishes a block before it starts the next one, so the context is clean. The network trusts clean
  context: it carries on every error in it, errors pile up, and long videos drift.
- HiAR turns the two loops around. At every denoising step it passes causally over all blocks, so a block that goes from
  sigma[s] to sigma[s + 1] sees the earlier ones at sigma[s + 1], where they have just arrived: matched-noise context.
  Errors in it lie under noise, and the later steps correct them.

The rest of the package computes the same, fast: in any order in which each task finds the KV that it reads, with the KV
in rings of constant size, in batches, as CUDA graphs, on several GPUs. None of this may change a result, and the tests
of the rollout hold it to this page.

Shapes: B videos, F latent frames of a block, C channels, H rows and W columns of a latent frame, L prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hiar_kernels import reference as ops

from ..common.checks import one_of
from ..config import TRAIN_TIMESTEPS, FlowSchedule
from ..models.transformer import HiARTransformer

KV = list[Tensor]
"""Keys and values of one block: for each layer a tensor [2, B, F, tokens of a frame, heads, head width]."""

CONTEXTS = ("matched", "next_step", "clean")
SAMPLERS = ("sde", "ode")


@torch.no_grad()
def hierarchical_denoising(
    model: HiARTransformer | Sequence[HiARTransformer],
    prompt_embeds: Tensor | Callable[[int], Tensor],
    schedule: FlowSchedule,
    noise: Callable[[int, int], Tensor],
    num_blocks: int,
    *,
    frames_per_block: int = 3,
    window_frames: int | None | Sequence[int | None] = None,
    sink_frames: int = 0,
    sampler: str = "sde",
    context: str = "matched",
    context_noise: float = 0.0,
    prefix: Tensor | None = None,
    conditioning_frames: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Latents of a whole video, by the definition of HiAR. Slow, and it keeps all KV: for reading, and for tests.

    Args:
        model: one network, or one for each of the S steps. Its weights' dtype is that of the computation: float64 tells
            what is exact.
        prompt_embeds: [B or 1, L, text_dim], or a function of the block number that returns this.
        schedule: noise levels sigma[0] > ... > sigma[S] = 0, each in 0 to 1.
        noise: function (step, block) -> standard normals [B, frames_per_block, C, H, W]; step -1 is the initial noise.
        num_blocks: blocks to make. Block numbers count from the start of the video, prefix included.
        frames_per_block: latent frames of a block.
        window_frames: latent frames that a block sees, its own included; None: all; or one such number for each step.
        sink_frames: frames at the start of the video that every block sees, within the number of ``window_frames``.
        sampler: "sde" adds fresh noise to the predicted clean latents, "ode" follows the predicted velocity.
        context: "matched" is HiAR. "next_step" saves S - 1 of the 2 S forwards of a block: as KV at step s it takes
            those that denoising at step s + 1 computes anyway, in the context of step s + 1. "clean" is Self-Forcing,
            the baseline. Each gives another video, and needs weights trained for it.
        context_noise: timestep, 0 to 1000, at which finished blocks leave their KV.
        prefix: clean latents [B, frames, C, H, W] to go on from. Its first block is the short one if need be.
        conditioning_frames: {frame number: clean latents [B, C, H, W]} of frames behind the prefix that are given; they
            are clean at every step, and the others of their block are made around them.

    Returns:
        Clean latents [B, frames, C, H, W] of the prefix and the made blocks, in the dtype of the weights.

    Raises:
        ValueError: ``sampler`` or ``context`` is not one of the above.

    What :class:`hiar_model.Rollout` offers beyond this: caching the context again when the prompt changes, infilling
    between given frames, and keys and values in float8.

    Example:
        >>> from hiar_model import FlowSchedule, HiARTransformer, WanConfig
        >>> from hiar_model.rollout.noise import keyed_noise
        >>> config = WanConfig(16, 32, 2, 2, text_dim=6, text_len=5, in_channels=4, out_channels=4)
        >>> model, prompt_embeds = HiARTransformer(config).double(), torch.randn(1, 5, 6)
        >>> seed, video, shape = 0, 0, (3, 4, 4, 8)  # frames, channels, rows and columns of a block
        >>> noise = lambda step, block: keyed_noise(seed, video, step, block, shape)[None]
        >>> latents = hierarchical_denoising(model, prompt_embeds, FlowSchedule(), noise, num_blocks=3)
        >>> latents.shape, latents.dtype
        (torch.Size([1, 9, 4, 4, 8]), torch.float64)
    """
    one_of("sampler", sampler, SAMPLERS)
    one_of("context", context, CONTEXTS)
    sigma, steps, last = schedule.sigmas, range(len(schedule)), len(schedule) - 1
    models = [model] * len(schedule) if isinstance(model, nn.Module) else model
    windows = window_frames if isinstance(window_frames, Sequence) else [window_frames] * len(schedule)
    weight = models[0].patch_embedding.weight

    prefix_frames = 0 if prefix is None else prefix.shape[1]
    prefix_blocks = -(-prefix_frames // frames_per_block)
    blocks = range(prefix_blocks + num_blocks)
    ends = [prefix_frames + (block + 1 - prefix_blocks) * frames_per_block for block in blocks]
    frames = [range(max(0, end - frames_per_block), end) for end in ends]

    # block -> its latents at the noise level that it has reached
    x = {block: noise(-1, block).to(weight) for block in blocks if block >= prefix_blocks}
    if prefix is not None:
        x |= {block: prefix[:, frames[block]].to(weight) for block in range(prefix_blocks)}
    fixed = {frame: latents.to(weight) for frame, latents in (conditioning_frames or {}).items()}

    def put_fixed(block: int) -> None:
        for frame in fixed.keys() & set(frames[block]):
            x[block][:, frame - frames[block].start] = fixed[frame]

    # (step, block) -> what later blocks see of this block at this step
    kv: dict[tuple[int, int], KV] = {}

    def forward(step: int, block: int, timestep: float) -> tuple[Tensor, KV]:
        """The network on a block, which sees the KV that earlier blocks have left at this step."""
        end, window = frames[block].stop, windows[step]
        visible = [f for f in range(end) if window is None or f >= end - (window - sink_frames) or f < sink_frames]
        timesteps = torch.full(x[block].shape[:2], timestep, dtype=torch.float64, device=weight.device)
        timesteps[:, [frame in fixed for frame in frames[block]]] = 0.0
        prompt = prompt_embeds(block) if callable(prompt_embeds) else prompt_embeds
        earlier = [kv[step, other] for other in range(block)]
        return forward_block(models[step], x[block], timesteps, prompt.to(weight), frames[block], earlier, visible)

    def task(step: int, block: int) -> None:
        """Take a block from sigma[step] to sigma[step + 1], then leave its KV there for the later blocks."""
        if block < prefix_blocks:
            reached = 0.0  # clean from the start
        else:
            velocity, own = forward(step, block, TRAIN_TIMESTEPS * sigma[step])
            if context == "next_step" and step > 0:
                kv[step - 1, block] = own
            # flow matching: x = (1 - sigma) x0 + sigma eps, and the network predicts the velocity eps - x0
            x0 = x[block] - sigma[step] * velocity
            if step == last:
                x[block] = x0
            elif sampler == "sde":
                x[block] = (1 - sigma[step + 1]) * x0 + sigma[step + 1] * noise(step, block).to(weight)
            else:
                x[block] = x[block] + (sigma[step + 1] - sigma[step]) * velocity
            put_fixed(block)
            reached = context_noise if step == last else TRAIN_TIMESTEPS * sigma[step + 1]
        if context == "matched" or step == last or block < prefix_blocks:
            kv[step, block] = forward(step, block, reached)[1]
        if context == "clean" and step == last:
            kv.update({(s, block): kv[last, block] for s in steps})

    for block in blocks:
        put_fixed(block)
    if context == "matched":  # hierarchical denoising: at every step, a causal pass over all blocks
        for step in steps:
            for block in blocks:
                task(step, block)
    else:  # the usual autoregression: every block goes through all steps before the next one starts
        for block in blocks:
            for step in steps:
                task(step, block)
    return torch.cat([x[block] for block in blocks], 1)


def forward_block(
    model: HiARTransformer,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    frames: Sequence[int],
    earlier: Sequence[KV] = (),
    visible: Sequence[int] | slice = slice(None),
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = ops.attention,
) -> tuple[Tensor, KV]:
    """The Wan2.1 transformer on one block, with the keys and values of earlier blocks as context. Differentiable.

    Args:
        latents: [B, F, C, H, W]. timesteps: [B, F], 1000 sigma. prompt_embeds: [B or 1, L, text_dim].
        frames: the F absolute frame numbers of the block, for the rotary position embedding.
        earlier: what this function returned for the blocks before, in order.
        visible: which frames to attend to, by position among those of ``earlier`` and then the block's own.
        attention: of queries, keys and values [B, T, heads, head width]; all keys are visible.

    Returns:
        Velocity eps - x0 [B, F, C, H, W], and the block's own :data:`KV`.

    Raises:
        ValueError: the prompt is longer than the network's.

    Example:
        >>> from hiar_model import WanConfig
        >>> config = WanConfig(16, 32, 2, 2, text_dim=6, text_len=5, in_channels=4, out_channels=4)
        >>> model, latents, t = HiARTransformer(config), torch.randn(1, 3, 4, 4, 8), torch.full((1, 3), 1000.0)
        >>> velocity, kv = forward_block(model, latents, t, torch.randn(1, 5, 6), frames=range(3))
        >>> velocity.shape, len(kv), kv[0].shape
        (torch.Size([1, 3, 4, 4, 8]), 2, torch.Size([2, 1, 3, 8, 2, 8]))
    """
    config, eps = model.config, model.config.eps
    batch, count, _, height, width = latents.shape
    grid = config.grid(height, width)

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (config.num_heads, -1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v).flatten(2)

    half = config.freq_dim // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=latents.device) / half)
    angles = timesteps.double()[..., None] * rates
    time = model.time_embedding(torch.cat([angles.cos(), angles.sin()], -1).to(latents.dtype))  # [B, F, dim]
    six = model.time_projection(time).unflatten(-1, (6, -1))
    padding = config.text_len - prompt_embeds.shape[1]  # zeros, which take part in cross-attention
    if padding < 0:
        raise ValueError(f"prompt_embeds must have at most {config.text_len} tokens, got {prompt_embeds.shape[1]}")
    prompt = model.text_embedding(nn.functional.pad(prompt_embeds, (0, 0, 0, padding))).expand(batch, -1, -1)
    x = model.patch_embedding(latents.transpose(1, 2)).flatten(2).transpose(1, 2)  # tokens [B, F P, dim]
    if model.position_embedding is not None:
        x = x + model.position_embedding.repeat(count, 1)
    rope: dict[str, Any] = {"num_heads": config.num_heads, "grid": grid, "eps": eps, "theta": config.rope_theta}
    frame_ids = torch.tensor([list(frames)], device=latents.device)

    kv: KV = []
    layers: Any = model.blocks
    for layer in layers:
        own, cross = layer.self_attn, layer.cross_attn
        shift1, scale1, gate1, shift2, scale2, gate2 = (layer.modulation[:, None] + six).unbind(2)
        # self-attention: its keys and values are all that later blocks see of this one
        qkv = own.qkv(ops.ada_layer_norm(x, shift1, scale1, eps=eps))
        q, k, v = ops.qk_norm_rope(qkv, own.norm_q.weight, own.norm_k.weight, frame_ids, **rope)
        kv.append(torch.stack([k, v]).unflatten(2, (count, -1)))
        context = torch.cat([*(block[len(kv) - 1] for block in earlier), kv[-1]], 2)  # frames in dim 2
        k, v = context[:, :, visible].flatten(2, 3)
        x = ops.gated_residual(x, own.o(attend(q, k, v)), gate1)
        # cross-attention to the prompt
        q = heads(ops.rms_norm(cross.q(layer.norm3(x)), cross.norm_q.weight, eps=eps))
        k, v = heads(ops.rms_norm(cross.k(prompt), cross.norm_k.weight, eps=eps)), heads(cross.v(prompt))
        x = x + cross.o(attend(q, k, v))
        # feed-forward
        x = ops.gated_residual(x, layer.ffn(ops.ada_layer_norm(x, shift2, scale2, eps=eps)), gate2)

    shift, scale = (model.head.modulation[:, None] + time[:, :, None]).unbind(2)
    patches = model.head.head(ops.ada_layer_norm(x, shift, scale, eps=eps))
    patches = patches.view(batch, count, *grid, *config.patch_size[1:], -1)
    return torch.einsum("bfyxpqc->bfcypxq", patches).reshape(batch, count, -1, height, width), kv
