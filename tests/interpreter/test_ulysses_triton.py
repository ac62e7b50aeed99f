"""Shared visits on Triton kernels: appended straight into the memory that is sent. One process, with itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from made_runs import make_rollout

import hiar_kernels
from hiar_model.config import FlowSchedule, WanConfig
from hiar_model.models.transformer import HiARTransformer

pytestmark = pytest.mark.interpreter

CONFIG = WanConfig(
    dim=64, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=6, in_channels=4, out_channels=4
)


@pytest.fixture
def alone(device) -> Iterator[None]:
    """A job of one process."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_the_same_latents_eager_and_captured(device):
    torch.manual_seed(0)
    model = HiARTransformer(CONFIG).to(device).eval().requires_grad_(False)
    text = torch.randn(1, 4, CONFIG.text_dim, device=device)
    captured = "recorded" if device.type == "cpu" else "graph"

    def run(**more) -> torch.Tensor:
        made = make_rollout(
            model, text, FlowSchedule.uniform(2), num_frames=4, height=4, width=4, frames_per_block=1,
            window_frames=2, order="wavefront", pairs=True, **more,
        )  # fmt: skip
        return torch.cat([block.latents for block in made], 1)

    with hiar_kernels.prefer("triton"):
        expected = run()
        assert float(expected.abs().max()) > 0.5
        for executor in ("eager", captured):
            torch.testing.assert_close(run(parallel="ulysses", executor=executor), expected, rtol=0, atol=1e-5)
