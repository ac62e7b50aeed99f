"""A random model that takes a millisecond a forward, and its rollouts."""

from __future__ import annotations

import torch

from hiar_model.config import WanConfig
from hiar_model.models.flow_schedule import FlowSchedule
from hiar_model.models.transformer import HiARTransformer
from hiar_model.rollout import Rollout

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
TEXT = torch.randn(1, 3, TINY.text_dim, generator=torch.Generator().manual_seed(1))


def run(num_frames: int = 9, steps: int = 4, **options) -> torch.Tensor:
    schedule = FlowSchedule.uniform(steps)
    made = Rollout(
        options.pop("model", MODEL), options.pop("text", TEXT), schedule, num_frames=num_frames, **SIZE, **options
    )
    return torch.cat([block.latents for block in made], 1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
