"""A random model that takes a millisecond a forward, its rollouts, and what they have to give."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from made_runs import make_rollout

from hiar_model.config import FlowSchedule, WanConfig
from hiar_model.models.transformer import HiARTransformer
from hiar_model.rollout.noise import keyed_noise
from hiar_model.rollout.reference import hierarchical_denoising

TINY = WanConfig(
    dim=16, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=8, text_dim=6, text_len=5, in_channels=2, out_channels=2
)
SIZE = {"height": 2, "width": 4}


def make_model(seed: int = 0, config: WanConfig = TINY) -> HiARTransformer:
    """A random model whose every part matters: no weight is zero, modulations are of order one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = HiARTransformer(config)
        for p in model.parameters():
            p.data.normal_(std=0.5 if p.dim() != 2 else 1.2 / p.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False)


MODEL = make_model()
SHALLOW = make_model(config=replace(TINY, num_layers=1))
"""For what does not depend on how many layers there are."""
TEXT = torch.randn(1, 3, TINY.text_dim, generator=torch.Generator().manual_seed(1))


def run(num_frames: int = 9, steps: int = 4, **options) -> torch.Tensor:
    schedule = FlowSchedule.uniform(steps)
    made = make_rollout(
        options.pop("model", MODEL), options.pop("text", TEXT), schedule, num_frames=num_frames, **SIZE, **options
    )
    return torch.cat([block.latents for block in made], 1)


def reference(
    num_frames: int = 9, steps: int = 4, *, model=MODEL, text=TEXT, batch: int = 1, video_ids=None, prefix=None,
    frames_per_block: int = 3, order: str = "step_first", cache_source: str = "own", trajectory: str = "sde", **options,
) -> torch.Tensor:  # fmt: skip
    """What :func:`run` has to give for the same options, by the page that defines it, in float64."""
    one_per_step = model if isinstance(model, list) else [model] * steps
    wide = {one: copy.deepcopy(one).double() for one in set(one_per_step)}
    shape = (frames_per_block, TINY.in_channels, *SIZE.values())
    ids = range(batch) if video_ids is None else video_ids
    given = 0 if prefix is None else prefix.shape[1]
    latents = hierarchical_denoising(
        [wide[one] for one in one_per_step],
        text,
        FlowSchedule.uniform(steps),
        lambda step, block: torch.stack([keyed_noise(0, video, step, block, shape) for video in ids]),
        (num_frames - given) // frames_per_block,
        frames_per_block=frames_per_block,
        sampler=trajectory,
        context="clean" if order == "block_first" else {"own": "matched"}.get(cache_source, cache_source),
        prefix=prefix,
        **options,
    )
    return latents[:, given:]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
