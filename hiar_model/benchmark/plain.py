"""The baseline of `hiar bench`: the same video in plain PyTorch, block by block, as one would first write it.

The network is that of `rollout/reference.py`, with torch's `scaled_dot_product_attention`. Keys and values of earlier
blocks lie in lists and are concatenated for every layer: no rings, no fused kernels, no graphs, no batched tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TRAIN_TIMESTEPS, RolloutConfig
from ..models.transformer import HiARTransformer
from ..rollout.reference import KV, forward_block


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, D] by torch's own attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@torch.no_grad()
def plain_blocks(
    models: HiARTransformer | Sequence[HiARTransformer],
    prompt_embeds: Tensor,
    config: RolloutConfig,
    noise: Callable[[int, int], Tensor],
) -> Iterator[Tensor]:
    """The blocks of an endless video, clean latents [B, F, C, H, W].

    Args:
        models: one network, or one for each step. prompt_embeds: [B or 1, L, text_dim].
        config: with order block_first the context is clean, else each step's own (or, with ``kv_source`` "next_step",
            the next step's).
        noise: (step, block) -> [B, F, C, H, W]; step -1 is the initial noise.

    Example:
        >>> from hiar_model import HiARTransformer, RolloutConfig, WanConfig
        >>> network = WanConfig(16, 32, 2, 2, text_dim=6, text_len=5, in_channels=4, out_channels=4)
        >>> noise = lambda step, block: torch.randn(1, 3, 4, 4, 8)
        >>> config = RolloutConfig(window_frames=6)
        >>> next(plain_blocks(HiARTransformer(network), torch.randn(1, 5, 6), config, noise)).shape
        torch.Size([1, 3, 4, 4, 8])
    """
    sigma, last, per_block = config.schedule.sigmas, len(config.steps) - 1, config.frames_per_block
    networks = [models] * (last + 1) if isinstance(models, HiARTransformer) else list(models)
    shared, clean = config.kv_source == "next_step", config.order == "block_first"
    sink = config.least_window - per_block
    weight = networks[0].patch_embedding.weight
    stored: list[dict[int, KV]] = [{} for _ in networks]  # for each step, block -> its keys and values

    def forward(step: int, block: int, x: Tensor, timestep: float) -> tuple[Tensor, KV]:
        window, end = config.windows[step], (block + 1) * per_block

        def of(number: int) -> range:
            return range(number * per_block, (number + 1) * per_block)

        def visible(frame: int) -> bool:
            return window is None or frame >= end - (window - sink) or frame < sink

        for other in list(stored[step]):
            if not any(map(visible, of(other))):
                del stored[step][other]
        frames = [frame for number in (*stored[step], block) for frame in of(number)]
        positions = [i for i, frame in enumerate(frames) if visible(frame)]
        timesteps = torch.full(x.shape[:2], timestep, dtype=torch.float64, device=weight.device)
        return forward_block(
            networks[step], x, timesteps, prompt_embeds.to(weight), [config.first_frame + frame for frame in of(block)],
            list(stored[step].values()), slice(None) if len(positions) == len(frames) else positions,
            attention=attention,
        )  # fmt: skip

    for block in count():
        x = noise(-1, block).to(weight)
        for step in range(last + 1):
            velocity, own = forward(step, block, x, TRAIN_TIMESTEPS * sigma[step])
            if shared and step > 0:
                stored[step - 1][block] = own
            x0 = x - sigma[step] * velocity
            if step == last:
                x = x0
            elif config.sampler == "sde":
                x = (1 - sigma[step + 1]) * x0 + sigma[step + 1] * noise(step, block).to(weight)
            else:
                x = x + (sigma[step + 1] - sigma[step]) * velocity
            reached = config.context_noise if step == last else TRAIN_TIMESTEPS * sigma[step + 1]
            if step == last or not (shared or clean):
                stored[step][block] = forward(step, block, x, reached)[1]
        if clean:
            for earlier in stored[:last]:
                earlier[block] = stored[last][block]
        yield x
